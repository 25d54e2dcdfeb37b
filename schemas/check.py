"""Does this table fit this schema? The error names the table, the column, and both types."""

import pyarrow as pa

from schemas.errors import WinnowError


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly the schema's columns, order and types; raises WinnowError with all misfits."""
    name = schema.metadata[b"table"].decode()
    problems = [problem for field in schema if (problem := _misfit(table, field))]
    extra = sorted(set(table.column_names) - set(schema.names))
    problems += [f"unknown column {column!r}" for column in extra]
    if problems:
        raise WinnowError(*(f"table {name}: {problem}" for problem in problems))
    return table.select(schema.names).cast(schema).combine_chunks()


def _misfit(table: pa.Table, field: pa.Field) -> str | None:
    if field.name not in table.column_names:
        return f"column {field.name!r} is missing"
    if table.column_names.count(field.name) > 1:
        return f"column {field.name!r} stands twice"
    column = table.column(field.name)
    if not _castable(column, field.type):
        return f"column {field.name!r} is {column.type}, must be {field.type}"
    if column.null_count and not field.nullable:
        return f"column {field.name!r} has {column.null_count} nulls, must have none"
    return None


def _castable(column: pa.ChunkedArray, wanted: pa.DataType) -> bool:
    """All-null columns fit anything; otherwise the type itself, or one whose values pyarrow takes over unchanged."""
    found = column.type
    if found == wanted or pa.types.is_null(found):
        return True
    try:
        column.cast(wanted)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return False
    return bool(pa.types.is_string(found) == pa.types.is_string(wanted))
