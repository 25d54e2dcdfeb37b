"""Check of a table against a schema of the data dictionary."""

import pyarrow as pa

from schemas.columns import table_name
from schemas.errors import WinnowError


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with exactly the schema's columns, order and types, in one chunk.

    A column is cast if pyarrow can do so without losing a value (int64 to int32, all-null to anything). Raises
    WinnowError with every misfit: table, column, and both types.
    """
    problems = []
    for field in schema:
        count = table.column_names.count(field.name)
        if count != 1:
            problems.append(f"column {field.name!r} {'is missing' if count == 0 else 'appears twice'}")
            continue
        column = table.column(field.name)
        try:
            column.cast(field.type)
            # pyarrow also turns numbers into text and text into numbers, which would hide a mistake in a stage
            fits = pa.types.is_null(column.type) or pa.types.is_string(column.type) == pa.types.is_string(field.type)
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
            fits = False
        if not fits:
            problems.append(f"column {field.name!r} is {column.type}, must be {field.type}")
        elif column.null_count and not field.nullable:
            problems.append(f"column {field.name!r} has {column.null_count} nulls, must have none")
    problems += [f"unknown column {name!r}" for name in sorted(set(table.column_names) - set(schema.names))]
    if problems:
        raise WinnowError(*(f"table {table_name(schema)}: {problem}" for problem in problems))
    return table.select(schema.names).cast(schema).combine_chunks()
