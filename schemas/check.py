"""Check of a table against a schema of the data dictionary."""

import pyarrow as pa
import pyarrow.compute as pc

from schemas.columns import table_name
from schemas.errors import WinnowError


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with exactly the schema's columns, order and types, in one chunk.

    A column is cast if pyarrow can do so without losing a value (int64 to int32, all-null to anything). Raises
    WinnowError with every misfit: table, column, and both types; log-probs that are not finite, too.
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
        else:
            problems += _not_finite(field, column)
    problems += [f"unknown column {name!r}" for name in sorted(set(table.column_names) - set(schema.names))]
    if problems:
        raise WinnowError(*(f"table {table_name(schema)}: {problem}" for problem in problems))
    return table.select(schema.names).cast(schema).combine_chunks()


def _not_finite(field: pa.Field, column: pa.ChunkedArray) -> list[str]:
    """Return what is wrong with the numbers of a column, or of a field of its rows, that must be finite."""
    if pa.types.is_list(field.type) and pa.types.is_struct(field.type.value_type):
        rows = pc.list_flatten(column.cast(field.type))
        inner = [
            (field.type.value_type.field(n), pc.struct_field(rows, n)) for n in range(field.type.value_type.num_fields)
        ]
        return [
            problem.replace("column '", f"column '{field.name}.", 1)
            for part, values in inner
            for problem in _not_finite(part, values)
        ]
    if b"finite" not in (field.metadata or {}) or column.null_count == len(column):
        return []
    count = pc.sum(pc.invert(pc.is_finite(column))).as_py() or 0
    return [f"column {field.name!r} has {count} numbers that are not finite (NaN or infinite)"] if count else []
