"""Options: the signature is the schema, and every mistake of a call is named at once, with place, value and cure."""

import pickle
from typing import Annotated, Any, Literal

import pytest
from ray import cloudpickle

from pipeline import Bound, Range, Registry, stages
from pipeline.config.keys import canonical, key_of
from schemas import WinnowError
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

OURS = [stages, gold_reward, head, mix, objective, pair_rule, normaliser, ranker, reward_scale, score_method]
OURS += [selection_rule]

shapes = Registry("shape")
tools = Registry("tool")


@shapes(corners=0)
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
) -> None:
    """Something with one option of every kind."""


DRAW = tools.entries["draw"]


def options(**given: Any) -> dict[str, Any]:
    return DRAW.validate({"shape": "circle"} | given, "draw")


def problems(**given: Any) -> tuple[str, ...]:
    with pytest.raises(WinnowError) as caught:
        options(**given)
    return caught.value.problems


def test_defaults_are_filled_in_and_positional_parameters_are_no_options():
    """Every keyword-only parameter comes back with a value: a key must not depend on what was left to default."""
    made = options()
    assert {name: made[name] for name in made if name != "shape"} == dict(
        outline=None, color="red", width=1, scale=1.0, labels=[], note=None
    )
    assert "canvas" not in made


def test_a_function_by_name_gets_its_own_defaults():
    assert options()["shape"].options == {"radius": 1.0}
    assert options(shape={"name": "circle", "radius": 2.5})["shape"].options == {"radius": 2.5}
    assert options(outline="circle")["outline"].name == "circle"


def test_a_bound_function_is_called_with_its_options_and_knows_its_facts():
    """size * side + tilt = 3 * 2.0 + 5."""
    bound = options(shape={"name": "square", "side": 2.0, "tilt": 5})["shape"]
    assert bound(3.0) == 11.0
    assert bound.metadata == {"corners": 4}
    assert options(shape=bound)["shape"] == bound


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"colour": "red"}, ["draw.colour: unknown option", "did you mean 'color'?"]),
        ({"zzzz": 1}, ["draw.zzzz: unknown option", "known: color, labels, note, outline, scale, shape, width"]),
        ({"width": "3"}, ["draw.width", "integer", "'3'"]),
        ({"width": 3.0}, ["draw.width", "integer", "3.0"]),
        ({"width": True}, ["draw.width", "integer", "True"]),
        ({"width": None}, ["draw.width", "integer", "None"]),
        ({"scale": "1e-3"}, ["draw.scale", "number", "'1e-3'"]),
        ({"note": 3}, ["draw.note", "string", "3"]),
        ({"labels": "a"}, ["draw.labels", "list", "'a'"]),
        ({"labels": ["a", 7]}, ["draw.labels.1", "string", "7"]),
        ({"color": "green"}, ["draw.color", "'red' or 'blue'", "'green'"]),
        ({"width": 0}, ["draw.width", "greater than 0", "got 0"]),
        ({"width": 11}, ["draw.width", "less than or equal to 10", "got 11"]),
        ({"shape": "cirkle"}, ["draw.shape", "unknown shape 'cirkle'", "did you mean 'circle'?"]),
        ({"shape": "xyz"}, ["draw.shape", "unknown shape 'xyz'", "known: circle, square"]),
        ({"shape": 3}, ["draw.shape", "must name one shape", "got 3"]),
        ({"shape": {"radius": 3.0}}, ["draw.shape", "`name`", "'radius': 3.0"]),
        ({"shape": {"name": "circle", "radius": 0.0}}, ["draw.shape.radius", "greater than 0", "got 0.0"]),
        ({"shape": {"name": "circle", "radiant": 1.0}}, ["draw.shape.radiant", "unknown option", "'radius'?"]),
        ({"shape": {"name": "square", "side": 1.0, "tilt": 90}}, ["draw.shape.tilt", "less than 90", "got 90"]),
        ({"shape": "square"}, ["draw.shape.side: required"]),
        ({"outline": "cirkle"}, ["draw.outline: unknown shape 'cirkle'"]),
        ({"outline": {"name": "circle", "radius": "x"}}, ["draw.outline.radius", "number", "'x'"]),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line_with_place_value_and_cure(given: dict, words: list[str]):
    found = problems(**given)
    assert len(found) == 1
    assert [word for word in words if word not in found[0]] == []


def test_a_missing_required_option_is_named():
    with pytest.raises(WinnowError, match=r"draw\.shape: required"):
        DRAW.validate({}, "draw")


def test_all_mistakes_of_one_call_come_at_once():
    """Nobody should mend a recipe one error at a time: five mistakes, two of them nested, five lines."""
    found = problems(colour="red", width=0, scale="big", shape={"name": "square", "tilt": 99})
    assert {line.split(": ")[0] for line in found} == {
        "draw.colour",
        "draw.width",
        "draw.scale",
        "draw.shape.side",
        "draw.shape.tilt",
    }


def test_not_a_number_is_out_of_every_range():
    """nan compares false with every bound, so it must not slip through."""
    assert problems(shape={"name": "circle", "radius": float("nan")})


@pytest.mark.parametrize("registry", OURS, ids=lambda registry: registry.kind)
def test_not_a_number_is_no_value_of_any_option(registry: Registry):
    for entry in registry.entries.values():
        for option in entry.options.model_fields:
            with pytest.raises(WinnowError) as caught:
                entry.validate({option: float("nan")}, entry.name)
            assert any(line.startswith(f"{entry.name}.{option}: ") for line in caught.value.problems), option


def test_a_function_without_a_needed_fact_is_refused_where_it_is_registered():
    registry = Registry("knife", "edge", "length")
    with pytest.raises(TypeError, match="knife bread: its decorator must say length"):

        @registry(edge="serrated")
        def bread() -> None: ...

    assert not registry.entries


def test_an_integer_given_for_a_float_is_that_float():
    """`scale: 2` and `scale: 2.0` are the same wish, so they have the same key."""
    for whole, exact in (
        (options(scale=2), options(scale=2.0)),
        (options(shape={"name": "circle", "radius": 2}), options(shape={"name": "circle", "radius": 2.0})),
    ):
        assert key_of(canonical(whole)) == key_of(canonical(exact))
        assert key_of(canonical(whole)) != key_of(canonical(options()))


def test_find_names_kind_and_nearest():
    with pytest.raises(WinnowError, match="unknown shape 'squar'; did you mean 'square'"):
        shapes.find("squar")


@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_entries_and_bound_functions_travel_to_workers(pickler: Any):
    """They go by reference: what arrives is the worker's own entry, with the options that were sent."""
    assert pickle.loads(pickler.dumps(DRAW)) is DRAW
    bound = options(shape={"name": "square", "side": 2.0})["shape"]
    arrived = pickle.loads(pickler.dumps(bound))
    assert arrived == bound
    assert arrived.entry is bound.entry
    assert arrived(1.0) == 2.0


def test_errors_travel_back_from_workers_whole():
    error = pickle.loads(pickle.dumps(WinnowError("first", "second")))
    assert error.problems == ("first", "second")
