"""Check of a table against a schema of the data dictionary."""

from collections.abc import Iterator
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc

from schemas.columns import table_name
from schemas.errors import WinnowError

SLICE_BYTES = 1 << 28  # an eighth of what one array of pa.string() holds, because rows differ in length


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with exactly the schema's columns, order and types, in as few chunks as pyarrow allows.

    A column is cast if no value is lost (int64 to int32, all-null to anything; float64 to float32 is rounded), and if
    it means the same: text as text, numbers as numbers, lists as lists, in whatever encoding DuckDB, pandas or polars
    write them. Raises WinnowError with every misfit: table, column, and both types; log-probs that are not finite, too.
    """
    problems, columns = [], []
    for field in schema:
        count = table.column_names.count(field.name)
        if count != 1:
            problems.append(f"column {field.name!r} {'is missing' if count == 0 else 'appears twice'}")
            continue
        column, result = table.column(field.name), None
        with suppress(pa.ArrowNotImplementedError, pa.ArrowInvalid):
            # pyarrow also turns numbers into text and text into numbers, which would hide a mistake in a stage
            if _means_the_same(column.type, field.type):
                if column.type != field.type:
                    plain = (_plain(chunk, field.type) for chunk in column.chunks)
                    parts = [part.cast(field.type) for array in plain for part in _slices(array)]
                    column = pa.chunked_array(parts, field.type)
                result = column
        if result is None:
            problems.append(f"column {field.name!r} is {column.type}, must be {field.type}")
        elif result.null_count and not field.nullable:
            problems.append(f"column {field.name!r} has {result.null_count} nulls, must have none")
        else:
            problems += _not_finite(field, result)
        columns.append(result)
    problems += [f"unknown column {name!r}" for name in sorted(set(table.column_names) - set(schema.names))]
    if problems:
        raise WinnowError(*(f"table {table_name(schema)}: {problem}" for problem in problems))
    return combine_chunks(pa.Table.from_arrays(columns, schema=schema))


def combine_chunks(table: pa.Table) -> pa.Table:
    """Return the table with one chunk per column, or with more where one cannot hold it: offsets are 32 bits wide."""
    try:
        return table.combine_chunks()  # itself leaves several chunks of text beyond 2 GiB
    except pa.ArrowInvalid:  # and fails on lists of more than 2^31 values, and on text in them
        return table


def _means_the_same(source: pa.DataType, target: pa.DataType) -> bool:
    """Return whether values of type `given` can be those of a column of type `wanted`, at any depth."""
    types = pa.types
    if types.is_dictionary(source) or types.is_run_end_encoded(source):
        return _means_the_same(source.value_type, target)
    if source == target or types.is_null(source):
        return True
    if types.is_string(target):
        return bool(types.is_large_string(source) or types.is_string_view(source))
    if types.is_map(target):
        entries = source if types.is_map(source) else _entries(source)
        pairs = ((entries.key_type, target.key_type), (entries.item_type, target.item_type)) if entries else ()
        return bool(pairs) and all(_means_the_same(*pair) for pair in pairs)
    if types.is_list(target):  # not list_view, which pyarrow 26 casts to lists with wrong offsets
        is_list = types.is_list(source) or types.is_large_list(source) or types.is_fixed_size_list(source)
        return is_list and _means_the_same(source.value_type, target.value_type)
    if types.is_struct(target):
        if not types.is_struct(source):
            return False
        fields = {field.name: field for field in source}
        names = {field.name for field in target}
        return fields.keys() <= names and all(
            _means_the_same(fields[field.name].type, field.type) if field.name in fields else field.nullable
            for field in target
        )
    is_number = types.is_integer(source) or types.is_floating(source) or types.is_decimal(source)
    return bool(is_number or types.is_boolean(source))


def _entries(source: pa.DataType) -> pa.MapType | None:
    """Return the map whose entries a list holds, as polars 1 writes a map, or None for any other type."""
    is_list = pa.types.is_list(source) or pa.types.is_large_list(source)
    if not is_list or not pa.types.is_struct(source.value_type):
        return None
    if [field.name for field in source.value_type] != ["key", "value"]:
        return None
    return pa.map_(*(field.type for field in source.value_type))


def _plain(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Return an array of values, without dictionary or runs; entries that are to be a map as one."""
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    if pa.types.is_dictionary(array.type):
        values = array.dictionary
        if pa.types.is_string(target):  # the texts of all rows may be more than 2 GiB
            values = values.cast(pa.large_string())
        array = values.take(array.indices)
    entries = _entries(array.type)
    if entries and pa.types.is_map(target):
        lists = array.cast(pa.list_(array.type.value_type))
        keys, items = lists.values.field(0), lists.values.field(1)
        array = pa.MapArray.from_arrays(lists.offsets, keys, items, entries, mask=lists.is_null())
    return array


def _slices(array: pa.Array) -> Iterator[pa.Array]:
    """Yield an array in parts that fit into 32-bit offsets; it may itself have offsets of 64 bits."""
    rows = max(1, len(array) * SLICE_BYTES // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        part = array.slice(start, rows)
        yield part if len(part) == len(array) else pa.concat_arrays([part])  # a copy, whose offsets begin at 0


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
