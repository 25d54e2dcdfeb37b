"""Registries: the signature is the schema, and all mistakes of a call are named at once, with place, value and cure."""

import pickle
from typing import Annotated, Any, Literal

import pytest
from ray import cloudpickle

from pipeline import Bound, Range, Registry, stage, stages
from pipeline.config.keys import canonical, key_of
from pipeline.registry import entry_of, nearest
from schemas import Prompts, WinnowError
from stages.data.formats import preference_reader
from stages.evaluation.evaluate import gold_reward
from stages.head.train import head
from stages.ranking.rankers import ranker
from stages.ranking.score import score_method
from stages.selection.normalisers import normaliser
from stages.selection.pair import pair_rule
from stages.selection.rules import selection_rule
from stages.selection.scales import reward_scale
from stages.training.mixing import mix
from stages.training.objectives import objective

REGISTRIES = [gold_reward, head, mix, objective, pair_rule, normaliser, preference_reader, ranker, reward_scale]
REGISTRIES += [score_method, selection_rule]

shapes = Registry("shape", "size", corners=int)
tools = Registry("tool")


@shapes(corners=0, aliases=("disc", "round"))
def circle(size: float, *, radius: Annotated[float, Range(gt=0)] = 1.0) -> float:
    return size * radius


@shapes(corners=4)
def square(size: float, *, side: float, tilt: Annotated[int, Range(ge=0, lt=90)] = 0) -> float:
    return size * side + tilt


@tools()
def draw(
    canvas: Any,
    *,
    shape: Annotated[Bound, shapes],
    outline: Annotated[Bound, shapes] | None = None,
    color: Literal["red", "blue"] = "red",
    width: Annotated[int, Range(gt=0, le=10)] = 1,
    scale: float = 1.0,
    labels: list[str] = [],  # noqa: B006 - read, never written
    note: str | None = None,
) -> Any:
    """Something with one option of every kind."""
    return canvas, shape, outline, width


@tools()
def trace(size: float, *, shape: Annotated[Bound, shapes] = "circle") -> float:  # type: ignore[assignment]
    return shape(size)


DRAW = tools.entries["draw"]


def options(**values: Any) -> dict[str, Any]:
    return DRAW.validate({"shape": "circle"} | values, "draw")


def problems(**values: Any) -> tuple[str, ...]:
    with pytest.raises(WinnowError) as caught:
        options(**values)
    return caught.value.problems


def test_defaults_are_filled_in_and_positional_parameters_are_no_options():
    """Every keyword-only parameter comes back with a value: a key must not depend on what was left to default."""
    values = options()
    assert {name: value for name, value in values.items() if name != "shape"} == dict(
        outline=None, color="red", width=1, scale=1.0, labels=[], note=None
    )
    assert "canvas" not in values


def test_a_function_by_name_has_its_defaults_its_options_and_its_metadata():
    """size * side + tilt = 3 * 2.0 + 5."""
    assert options()["shape"].options == {"radius": 1.0}
    assert options(shape={"name": "circle", "radius": 2.5})["shape"].options == {"radius": 2.5}
    assert options(outline="circle")["outline"].name == "circle"
    bound = options(shape={"name": "square", "side": 2.0, "tilt": 5})["shape"]
    assert bound(3.0) == 11.0
    assert bound.metadata == {"corners": 4}
    assert options(shape=bound)["shape"] == bound


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"colour": "red"}, ["draw.colour: unknown option", "did you mean 'color'?"]),
        ({"zzzz": 1}, ["draw.zzzz: unknown option", "known: color, labels, note, outline, scale, shape, width"]),
        ({"width": "3"}, ["draw.width", "integer", "got '3'"]),
        ({"width": 3.0}, ["draw.width", "integer", "got 3.0"]),
        ({"width": True}, ["draw.width", "integer", "got True"]),
        ({"width": None}, ["draw.width", "integer", "got None"]),
        ({"scale": "1e-3"}, ["draw.scale", "number", "'1e-3'"]),
        ({"note": 3}, ["draw.note", "string", "got 3"]),
        ({"labels": ["a", 7]}, ["draw.labels.1", "string", "got 7"]),
        ({"color": "green"}, ["draw.color", "'red' or 'blue'", "'green'"]),
        ({"width": 0}, ["draw.width", "greater than 0", "got 0"]),
        ({"width": 11}, ["draw.width", "less than or equal to 10", "got 11"]),
        ({"shape": "cirkle"}, ["draw.shape", "unknown shape 'cirkle'", "did you mean 'circle'?"]),
        ({"shape": "dics"}, ["draw.shape", "unknown shape 'dics'", "did you mean 'disc'?"]),
        ({"shape": "xyz"}, ["draw.shape", "unknown shape 'xyz'", "known: circle (disc, round), square"]),
        ({"shape": 3}, ["draw.shape", "must name one shape", "got 3"]),
        ({"shape": {"radius": 3.0}}, ["draw.shape", "`name`", "'radius': 3.0"]),
        ({"shape": {"name": "circle", "radius": 0.0}}, ["draw.shape.radius", "greater than 0", "got 0.0"]),
        ({"shape": {"name": "circle", "radius": float("nan")}}, ["draw.shape.radius", "greater than 0", "got nan"]),
        ({"shape": {"name": "circle", "radiant": 1.0}}, ["draw.shape.radiant", "unknown option", "'radius'?"]),
        ({"shape": "square"}, ["draw.shape.side: required"]),
        ({"outline": "cirkle"}, ["draw.outline: unknown shape 'cirkle'"]),
        ({"outline": {"name": "circle", "radius": "x"}}, ["draw.outline.radius", "number", "'x'"]),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line_with_place_value_and_cure(values: dict, words: list[str]):
    lines = problems(**values)
    assert len(lines) == 1
    assert [word for word in words if word not in lines[0]] == []


def test_all_mistakes_of_one_call_come_at_once():
    """Nobody should correct a recipe one error at a time: five mistakes, two of them nested, five lines."""
    lines = problems(colour="red", width=0, scale="big", shape={"name": "square", "tilt": 99})
    places = ["draw.colour", "draw.scale", "draw.shape.side", "draw.shape.tilt", "draw.width"]
    assert sorted(line.split(": ")[0] for line in lines) == places
    with pytest.raises(WinnowError, match=r"draw\.shape: required"):
        DRAW.validate({}, "draw")


def test_not_a_number_is_not_a_value_of_any_option():
    """nan compares false with every bound, so a range alone would let it through."""
    for registry in [stages, *REGISTRIES]:
        for entry in registry.entries.values():
            for option in entry.options.model_fields:
                with pytest.raises(WinnowError) as caught:
                    entry.validate({option: float("nan")}, entry.name)
                assert any(line.startswith(f"{entry.name}.{option}: ") for line in caught.value.problems), option


def test_what_cannot_be_registered_is_refused_where_it_is_defined():
    """Metadata that a registry requires; a name or an alias that another function has."""
    registry = Registry("knife", edge=str, length=int)

    def bread() -> None: ...
    def steak() -> None: ...

    with pytest.raises(TypeError, match="knife steak: its decorator must set length"):
        registry(edge="serrated")(steak)
    for _ in range(2):  # a module may be reloaded
        registry(edge="plain", length=3, aliases=("slicer",))(bread)
    for name in ("bread", "slicer"):
        with pytest.raises(TypeError, match=f"knife '{name}' is already registered"):
            registry(edge="plain", length=3, aliases=(name,))(steak)
    assert list(registry.entries) == ["bread"]


def test_an_integer_given_for_a_float_is_that_float():
    """`scale: 2` and `scale: 2.0` are the same value, so they have the same key."""
    for whole, exact in (
        (options(scale=2), options(scale=2.0)),
        (options(shape={"name": "circle", "radius": 2}), options(shape={"name": "circle", "radius": 2.0})),
    ):
        assert key_of(canonical(whole)) == key_of(canonical(exact)) != key_of(canonical(options()))


def test_an_alias_is_the_same_function_with_the_same_key():
    alias, name = (options(shape={"name": word, "radius": 2.0}) for word in ("disc", "circle"))
    assert alias == name
    assert key_of(canonical(alias)) == key_of(canonical(name))
    assert shapes.find("round") is shapes.find("circle")
    shapes.forget(shapes.entries["square"])
    assert shapes.find("disc")
    shapes(corners=4)(square)


def test_a_decorator_with_metadata_of_its_own_has_three_forms():
    """Bare, called, and with metadata that replaces or adds to its own: each function keeps its own version."""
    registry = Registry("ranker", reads_model=bool, program=bool)
    verifiable = registry.decorator(reads_model=False, program=True, version=2)

    @verifiable
    def first() -> None: ...

    @verifiable()
    def second() -> None: ...

    @verifiable(version=3, aliases=("newest",))
    def third() -> None: ...

    assert [entry.metadata for entry in registry.entries.values()] == [
        dict(reads_model=False, program=True, version=version) for version in (2, 2, 3)
    ]
    assert registry.find("newest").name == "third"


def test_a_registered_function_can_be_called_directly_with_what_a_recipe_would_write():
    """Names and mappings are bound, defaults too; what is bound already is passed on; mistakes have their place."""
    assert trace(3.0) == trace(3.0, shape="disc") == 3.0
    assert trace(3.0, shape={"name": "square", "side": 2.0}) == 6.0
    assert trace(3.0, shape=options(shape={"name": "circle", "radius": 2.0})["shape"]) == 6.0
    canvas, shape, outline, width = draw("c", shape="circle", width="unchecked")
    assert (canvas, shape.options, outline, width) == ("c", {"radius": 1.0}, None, "unchecked")
    for wrong, words in (("cirkle", r"trace\.shape: unknown shape"), ({"name": "square"}, r"trace\.shape\.side: requ")):
        with pytest.raises(WinnowError, match=words):
            trace(3.0, shape=wrong)


def test_a_stage_can_be_called_directly():
    @stage(version=1)
    def toy_rank(prompts: Prompts, *, by: Annotated[Bound, shapes] = "square") -> Prompts:  # type: ignore[assignment]
        return by.metadata["corners"]

    stages.forget(entry_of(toy_rank))
    assert toy_rank(None, by={"name": "square", "side": 1.0}) == 4
    assert toy_rank(None, by="disc") == 0
    with pytest.raises(WinnowError, match=r"toy_rank\.by\.side: required"):
        toy_rank(None)


@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_entries_and_bound_functions_travel_to_workers(pickler: Any):
    """They go by reference: what arrives is the worker's own entry, with the options that were sent."""
    assert pickle.loads(pickler.dumps(DRAW)) is DRAW
    assert pickle.loads(pickler.dumps(trace)) is trace
    bound = options(shape={"name": "square", "side": 2.0})["shape"]
    arrived = pickle.loads(pickler.dumps(bound))
    assert arrived == bound
    assert arrived.entry is bound.entry
    assert arrived(1.0) == 2.0


def test_errors_travel_back_from_workers_whole():
    error = pickle.loads(pickle.dumps(WinnowError("first", "second")))
    assert error.problems == ("first", "second")


@pytest.mark.parametrize(
    ("name", "names", "hint"),
    [
        ("r", ["raft", "rest", "reward", "rspo"], "known: raft, rest, reward, rspo"),  # four are too many
        ("s", ["slic", "spin"], "did you mean 'slic' or 'spin'?"),
        ("gpu", ["gpu_memory", "gpus"], "did you mean 'gpus'?"),
        ("rafft", ["raft", "rest"], "did you mean 'raft'?"),
    ],
)
def test_an_unknown_name_is_taken_for_a_few_that_it_begins_or_for_the_nearest(name: str, names: list[str], hint: str):
    assert nearest(name, names) == hint
