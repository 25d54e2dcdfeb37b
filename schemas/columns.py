"""How the data dictionary writes down a column and a table: Arrow fields and schemas that carry their description.

The descriptions travel as Arrow metadata: they stand in every Parquet file, in `.tables NAME` of `winnow sql`, in the
comments of an exported DuckDB file, and in schemas/README.md.
"""

import pyarrow as pa


def column(name: str, type: pa.DataType, meaning: str, *, nullable: bool = False, finite: bool = False) -> pa.Field:
    """Return a column. A `finite` one holds numbers none of which may be NaN or infinite."""
    return pa.field(
        name, type, nullable=nullable, metadata={"meaning": meaning} | ({"finite": "yes"} if finite else {})
    )


def table(name: str, row: str, *columns: pa.Field) -> pa.Schema:
    """Return the schema of the table `name`; `row` says what one row of it stands for."""
    return pa.schema(columns, metadata={"table": name, "about": row})


def table_name(schema: pa.Schema) -> str:
    return str(schema.metadata[b"table"].decode())
