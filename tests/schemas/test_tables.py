"""The data dictionary is enforced: a table fits its schema or is rejected by column; ids come from content alone."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas import (
    TABLES,
    WinnowError,
    candidate_id,
    combine_chunks,
    conform,
    prompt_id,
    seed_for,
    seeds_for,
    shard_of,
    split_of,
    token_digest,
    token_digests,
)
from schemas.tables import CANDIDATES, EVALUATIONS, EXAMPLES, REWARDS

ROW: dict[str, list] = dict(metric=["kl"], value=[1.0], low=[0.5], high=[1.5], n=[3])
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=6)
TEXT = st.text(max_size=8)
calm = settings(deadline=None, derandomize=True, database=None)


def problems(columns: dict, schema: pa.Schema = EVALUATIONS) -> tuple[str, ...]:
    with pytest.raises(WinnowError) as caught:
        conform(pa.table(columns), schema)
    return caught.value.problems


def fields(schema: Sequence[pa.Field]) -> list[pa.Field]:
    """The schema's fields, and those inside lists and structs."""
    all_fields = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        all_fields += [field, *(fields(list(kind)) if pa.types.is_struct(kind) else [])]
    return all_fields


def test_a_table_that_fits_gets_exactly_the_schema():
    """In whatever order and however many chunks its columns were: columns, types and metadata are the schema's, and
    the same rows are the same bytes in the store."""
    table = pa.table({name: ROW[name] for name in reversed(ROW)})
    result = conform(pa.concat_tables([table, table, table]), EVALUATIONS)
    assert result.schema.equals(EVALUATIONS, check_metadata=True)
    assert result.to_pylist() == [{name: values[0] for name, values in ROW.items()}] * 3
    assert result.column("n").num_chunks == 1


@pytest.mark.parametrize("name", TABLES)
def test_every_table_and_column_has_a_meaning(name: str):
    """The schema is the documentation. An empty table fits too: a part may have no rows."""
    schema = TABLES[name]
    assert schema.metadata[b"table"].decode() == name
    assert schema.metadata[b"about"].startswith(b"one row per ")
    assert [field.name for field in fields(schema) if not (field.metadata or {}).get(b"meaning", b"").strip()] == []
    assert len(set(schema.names)) == len(schema.names)
    assert conform(schema.empty_table(), schema).num_rows == 0


def test_a_misfit_names_table_column_and_both_types():
    for change, words in (
        ({"value": ["high"]}, "column 'value' is string, must be double"),
        ({"metric": [3]}, "column 'metric' is int64, must be string"),
        ({"n": ["3"]}, "column 'n' is string, must be int64"),
        ({"n": [1.5]}, "column 'n' is double, must be int64"),
        ({"n": [[3]]}, "column 'n' is list<item: int64>, must be int64"),
        ({"value": [None]}, "column 'value' has 1 nulls, must have none"),
        ({"extra": [1]}, "unknown column 'extra'"),
    ):
        assert problems(ROW | change) == (f"table evaluations: {words}",)
    assert problems({name: ROW[name] for name in ROW if name != "low"}) == (
        "table evaluations: column 'low' is missing",
    )
    twice = pa.Table.from_arrays([pa.array([1.0])] * 2, names=["reward", "reward"])
    with pytest.raises(WinnowError, match="column 'reward' appears twice"):
        conform(twice, REWARDS)


def test_lists_beyond_32_bit_offsets_stay_in_several_chunks():
    """Of 2^31 values and more, in 64 MiB of memory: the chunks are one. A table that fits gets one chunk per column."""
    zeros = pa.array(np.zeros(2**26, np.int8))
    chunk = pa.ListArray.from_arrays(pa.array([0, 2**26], pa.int32()), zeros)
    column = pa.chunked_array([chunk] * 33)
    assert combine_chunks(pa.table({"features": column}))["features"].num_chunks == 33
    assert combine_chunks(pa.table({"features": column.slice(0, 2)}))["features"].num_chunks == 1


TEXTS = pa.array(["a", "a", None, "text of more than 12 bytes"])
SAME_TEXTS = {
    "large_string": TEXTS.cast(pa.large_string()),
    "string_view": TEXTS.cast(pa.string_view()),
    "dictionary": TEXTS.dictionary_encode(),
    "dictionary of large_string": TEXTS.cast(pa.large_string()).dictionary_encode(),
    "dictionary of string_view": pa.DictionaryArray.from_arrays(
        pa.array([0, 0, None, 1]), pa.array(["a", "text of more than 12 bytes"], pa.string_view())
    ),
    "runs": pc.run_end_encode(TEXTS),
}


@pytest.mark.parametrize("encoding", SAME_TEXTS)
def test_text_is_text_in_every_encoding(encoding: str):
    """As polars, pandas and DuckDB write it, sliced and in several chunks too."""
    given = SAME_TEXTS[encoding]
    column = pa.chunked_array([given, given[1:3], given[:0]])
    rows = pa.table(
        {"prompt_id": ["p"] * 6, "candidate_id": list("abcdef"), "reward": [1.0] * 6, "baseline_id": column}
    )
    for name in ("logit_ab", "logit_ba", "components", "label_threshold"):
        rows = rows.append_column(name, pa.nulls(6))
    result = conform(rows, REWARDS)
    result.validate(full=True)
    assert result["baseline_id"].to_pylist() == [*TEXTS.to_pylist(), "a", None]
    assert result.schema.equals(REWARDS, check_metadata=True)


def test_nulls_of_a_dictionary_are_counted():
    """They may be among its values, where the column itself has none."""
    names = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1]), pa.array(["kl", None]))
    numbers = {name: values * 3 for name, values in ROW.items()}
    assert problems(numbers | {"metric": names}) == ("table evaluations: column 'metric' has 2 nulls, must have none",)


LARGE_RESPONSES = pa.large_list(
    pa.struct(
        [
            ("token_ids", pa.large_list(pa.int64())),
            ("candidate_id", pa.string_view()),
            ("weight", pa.float64()),
            ("desirable", pa.int64()),
        ]
    )
)


def example_columns(response: dict, kind: pa.DataType) -> dict:
    pairs = pa.array([[]], EXAMPLES.field("pairs").type)
    columns = {"prompt_id": ["p"], "prompt_ids": [[1]], "responses": pa.array([[response]], kind), "pairs": pairs}
    return columns | {"ref_model": [None], "ref_dtype": [None]}


def test_nested_columns_are_cast_without_loss_or_refused():
    """Fields in any order, those that may be null missing; numbers that are text, other fields and views are not."""
    response = {"token_ids": [1, 2], "candidate_id": "c", "weight": 0.5, "desirable": -1}
    row = conform(pa.table(example_columns(response, LARGE_RESPONSES)), EXAMPLES).to_pylist()[0]
    absent = ("mask", "ref_logp", "drawn_logp", "drawn_by", "drawn_dtype")
    assert row["responses"] == [response | dict.fromkeys(absent)]
    fields = list(LARGE_RESPONSES.value_type)
    for wrong in (
        [field if field.name != "candidate_id" else pa.field("candidate_id", pa.int64()) for field in fields],
        [field if field.name != "weight" else pa.field("weight", pa.string()) for field in fields],
        [field for field in fields if field.name != "weight"],
        [*fields, pa.field("more", pa.int64())],
    ):
        kind = pa.list_(pa.struct(wrong))
        value = {
            field.name: pa.scalar(1).cast(field.type).as_py() for field in wrong if not pa.types.is_nested(field.type)
        }
        (line,) = problems(example_columns(value | {"token_ids": [1]}, kind), EXAMPLES)
        assert line.startswith("table examples: column 'responses' is list<"), line
    views = pa.table(example_columns(response, LARGE_RESPONSES)).set_column(
        1, "prompt_ids", pa.array([[1]], pa.list_view(pa.int32()))
    )
    with pytest.raises(WinnowError, match="column 'prompt_ids' is list_view"):
        conform(views, EXAMPLES)


def test_a_list_of_entries_is_a_map():
    """As polars 1 writes a map; one that is null stays null."""
    entries = pa.large_list(pa.struct([("key", pa.large_string()), ("value", pa.float64())]))
    given = pa.array([[{"key": "a", "value": 1.0}], None, [], [{"key": "b", "value": 2.0}]], entries)
    rows = {"prompt_id": ["p"] * 3, "candidate_id": ["a", "b", "c"], "reward": [0.0] * 3, "components": given[1:]}
    rows |= {name: pa.nulls(3) for name in ("baseline_id", "logit_ab", "logit_ba", "label_threshold")}
    assert conform(pa.table(rows), REWARDS)["components"].to_pylist() == [None, [], [("b", 2.0)]]


def test_all_misfits_are_reported_at_once():
    lines = problems({"metric": [3], "value": [None], "low": [0.5], "n": [1], "more": [1]})
    assert [line.split("'")[1] for line in lines] == ["metric", "value", "high", "more"]


def test_no_table_holds_a_log_prob_that_is_not_finite():
    """By the column's name, in a row of its own and in a list of rows; other numbers may be NaN, nulls are none."""
    row = dict(prompt_id="p", candidate_id="c", k=0, token_ids=[1], text="x", logp_kind="raw", n_tokens=1)
    rows = [row | dict(finish_reason="stop", logp=logp) for logp in (math.nan, -1.0, None, -math.inf)]
    facts = "column 'logp' has 2 numbers that are not finite"
    assert facts in problems(pa.Table.from_pylist(rows, schema=CANDIDATES), CANDIDATES)[0]
    conform(pa.Table.from_pylist(rows[1:3], schema=CANDIDATES), CANDIDATES)
    responses = [dict(candidate_id="c", token_ids=[1], weight=1.0, ref_logp=logp) for logp in (math.nan, None)]
    group = pa.Table.from_pylist([dict(prompt_id="p", prompt_ids=[1], responses=responses, pairs=[])], schema=EXAMPLES)
    assert "column 'responses.ref_logp' has 1 numbers" in problems(group, EXAMPLES)[0]


def test_numbers_are_cast_only_without_loss():
    """int64 to double, and to int32 if the value fits; a value that does not fit is rejected, not wrapped."""
    assert conform(pa.table(ROW | {"value": [1]}), EVALUATIONS).column("value").to_pylist() == [1.0]
    row = dict(prompt_id=["p"], candidate_id=["c"], k=[0], token_ids=[[1, 2]], text=["x"], logp=[None])
    row |= dict(raw_text=[None], logp_kind=["none"], n_tokens=[2], finish_reason=["stop"], seed=[None])
    row |= dict(model=[None], dtype=[None], mask=[None], chat=[None])
    assert conform(pa.table(row), CANDIDATES).column("token_ids").to_pylist() == [[1, 2]]
    assert "'k' is int64, must be int32" in problems(row | {"k": [2**40]}, CANDIDATES)[0]
    assert "'token_ids'" in problems(row | {"token_ids": [[2**40]]}, CANDIDATES)[0]


def test_nested_columns_are_checked_inside():
    """A response without its id is rejected, even two levels down."""
    row = dict(prompt_id=["p"], prompt_ids=[[1]], pairs=[[]], ref_model=[None], ref_dtype=[None])
    response = dict(candidate_id="c", token_ids=[1], weight=1.0, ref_logp=None)
    assert conform(pa.table(row | {"responses": [[response]]}), EXAMPLES).num_rows == 1
    assert "'responses'" in problems(row | {"responses": [[response | {"candidate_id": None}]]}, EXAMPLES)[0]


Draw = st.tuples(TEXT, TOKENS, st.integers(0, 3))


@calm
@given(Draw, Draw)
@example(("a", [1], 0), ("a1", [], 0))
@example(("p", [1, 2], 0), ("p", [258], 0))
@example(("p", [1], 10), ("p", [1, 10], 0))
def test_two_draws_share_an_id_only_if_they_are_the_same(one, other):
    """Prompt, tokens, copy: no part of one runs over into the next."""
    assert (candidate_id(*one) == candidate_id(*other)) == (one == other)


@calm
@given(TEXT, TOKENS)
def test_a_candidate_id_takes_any_sequence_of_the_same_tokens(prompt: str, tokens: list[int]):
    """A list, a tuple or an array of any integer type."""
    kinds: list[Callable[[list[int]], Any]] = [list, tuple, np.array, lambda ids: np.array(ids, np.int32)]
    ids = {candidate_id(prompt, kind(tokens)) for kind in kinds}
    assert len(ids) == 1
    assert len(ids.pop()) == 20


@calm
@given(TOKENS, TOKENS, TOKENS, TOKENS)
def test_a_token_digest_knows_where_the_prompt_ends(prompt, response, other_prompt, other_response):
    """The same ids with the prompt ending elsewhere have another digest."""
    same = (prompt, response) == (other_prompt, other_response)
    assert (token_digest(prompt, response) == token_digest(other_prompt, other_response)) == same
    if response:
        assert token_digest(prompt, response) != token_digest([*prompt, response[0]], response[1:])


MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), min_size=1, max_size=3)


@calm
@given(st.one_of(TEXT, MESSAGES), st.one_of(TEXT, MESSAGES))
def test_two_prompts_share_an_id_only_if_they_are_the_same(one, other):
    assert (prompt_id(one) == prompt_id(other)) == (one == other)


@calm
@given(MESSAGES)
def test_a_prompt_id_does_not_depend_on_the_order_of_keys(messages):
    assert prompt_id(messages) == prompt_id([dict(reversed(message.items())) for message in messages])


@calm
@given(TEXT, st.integers(1, 99_999))
def test_a_shard_is_in_range_and_always_the_same(prompt: str, shards: int):
    assert 0 <= shard_of(prompt, shards) < shards
    assert shard_of(prompt, shards) == shard_of(prompt, shards)
    assert shard_of(prompt, 1) == 0


def test_ids_are_the_same_in_every_release():
    """A store outlives the code: if ids changed, every cached result would be lost and joins with old files break."""
    name = prompt_id("Hello")
    assert name == "67cff6c3d37cf80b1183"
    assert candidate_id(name, [1, 2, 3]) == "67206caa7df5d48fce6d"
    assert (shard_of(name, 8), seed_for(0, name, 1), split_of(name, 0.5)) == (5, 430135706050755198, "train")


def test_shards_are_about_equal():
    """8,000 prompts in 8 shards: 1,000 each with a deviation of 30; five of those would be a broken hash."""
    counts = np.bincount([shard_of(prompt_id(f"prompt {n}"), 8) for n in range(8000)])
    assert np.all(np.abs(counts - 1000) < 150)


@calm
@given(st.integers(), st.lists(st.one_of(TEXT, st.integers()), max_size=3))
def test_a_seed_fits_63_bits(seed: int, names: list):
    """NumPy, torch and vLLM all take it, and a signed column holds it."""
    result = seed_for(seed, *names)
    assert 0 <= result < 2**63
    assert result == seed_for(seed, *names)
    assert np.int64(result) == result


@calm
@given(st.integers(), TEXT, st.lists(TEXT, max_size=4))
def test_seeds_of_many_ids_are_those_of_each(seed: int, name: str, ids: list[str]):
    assert seeds_for(seed, name, pa.array(ids, pa.string())).tolist() == [seed_for(seed, name, item) for item in ids]


@calm
@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=3), st.data())
def test_token_digests_of_many_responses_are_those_of_each(prompts: list[list[int]], data: st.DataObject):
    """Responses with and without a mask, of any prompt; also of arrays that begin within a larger one."""
    rows = st.tuples(st.integers(0, len(prompts) - 1), st.lists(st.integers(0, 9), max_size=3), st.booleans())
    drawn = data.draw(st.lists(rows, max_size=5))
    masks = [[token % 2 == 0 for token in ids] if masked else None for _, ids, masked in drawn]
    arrays = [
        pa.array([[7, 7], *values], pa.list_(kind))[1:]
        for values, kind in ((prompts, pa.int32()), ([ids for _, ids, _ in drawn], pa.int32()))
    ]
    numbers = np.array([number for number, _, _ in drawn], dtype=np.int64)
    expected = [token_digest(prompts[n], ids, mask) for (n, ids, _), mask in zip(drawn, masks, strict=True)]
    assert token_digests(arrays[0], numbers, arrays[1], pa.array(masks, pa.list_(pa.bool_()))) == expected


def test_every_draw_has_its_own_seed():
    """Seeds, prompts and draws: 2 * 50 * 20 of them, all different; and ("1", "2") is not ("12",)."""
    seeds = {seed_for(seed, f"p{p}", k) for seed in range(2) for p in range(50) for k in range(20)}
    assert len(seeds) == 2000
    assert seed_for(0, "1", "2") != seed_for(0, "12")


def test_the_held_out_share_is_about_the_option():
    """Of 4,000 prompts, within five standard deviations; none at all at 0."""
    names = [prompt_id(f"prompt {n}") for n in range(4000)]
    for heldout in (0.0, 0.05, 0.2, 0.5, 0.9):
        share = np.mean([split_of(name, heldout) == "heldout" for name in names])
        assert abs(share - heldout) <= 5 * np.sqrt(heldout * (1 - heldout) / 4000)


@calm
@given(TEXT, st.floats(0, 1), st.floats(0, 1))
def test_a_prompt_once_held_out_stays_so_when_more_is_held_out(prompt: str, one: float, other: float):
    """So that a larger test set contains the smaller one, and no old test prompt becomes training data."""
    less, more = sorted([one, other])
    assert split_of(prompt, less) == "train" or split_of(prompt, more) == "heldout"


@calm
@given(TEXT, st.floats(0, 0.5), st.floats(0, 0.49))
def test_validation_is_taken_from_what_is_trained_on_alone(prompt: str, heldout: float, validation: float):
    """Hold out the same prompts whatever the share, and take none for a share of 0."""
    split = split_of(prompt, heldout, validation)
    assert (split == "heldout") == (split_of(prompt, heldout) == "heldout")
    assert (split == "validation") == (split_of(prompt, 0.0, validation) == "validation")
    assert split_of(prompt, heldout, 0.0) == split_of(prompt, heldout)


def test_the_validation_share_is_about_the_option():
    """Draw 4,000 prompts: the share is met within five standard deviations."""
    splits = [split_of(prompt_id(f"prompt {n}"), 0.3, 0.2) for n in range(4000)]
    assert abs(np.mean([split == "validation" for split in splits]) - 0.2) <= 5 * np.sqrt(0.16 / 4000)


def test_split_and_shard_are_independent():
    """Else a shard would hold only held-out prompts: of 4,000 prompts in 4 shards, each has about half held out."""
    names = [prompt_id(f"prompt {n}") for n in range(4000)]
    for shard in range(4):
        inside = [split_of(name, 0.5) == "heldout" for name in names if shard_of(name, 4) == shard]
        assert abs(np.mean(inside) - 0.5) < 0.08
