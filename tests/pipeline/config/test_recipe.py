"""From YAML to steps: what is written wins over what is below it, and what cannot be read is said in one line."""

import math
from pathlib import Path

import pytest

from jobs import recipes
from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe, load_recipe
from schemas import WinnowError
from tests.conftest import write_jsonl


def load(folder: Path, text: str, *sets: str, overlays: tuple[Path, ...] = ()) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overlays, sets)


def options(recipe: Recipe, step: str) -> dict:
    return recipe.steps[step]["with"]


def own_world(world: Path) -> Path:
    """Two candidates a prompt with their rewards, and an SFT policy of random weights."""
    rows = [{"prompt": f"Book {n}.", "response": f"Booked {n} {k}.", "reward": k} for n in range(6) for k in range(2)]
    write_jsonl(world / "own.jsonl", rows)
    overlay = world / "own_world.yaml"
    overlay.write_text(
        "sft: {use: untrained, with: {corpus: ./own.jsonl, columns: [prompt, response], vocabulary: 400, context: 64}}"
    )
    return overlay


def plan_of(recipe: str, world: Path, *sets: str) -> Plan:
    """A recipe of ours on the tiny world."""
    if recipe == "own_candidates":
        here = (
            f"own_candidates.path={world / 'own.jsonl'}",
            "own_candidates.reward=reward",
            "optimize.learning_rate=0.001",
        )
        return recipes.plans([recipe], [own_world(world)], [*here, *sets])[0]
    return recipes.plans([recipe], [world / "demo.yaml"], list(sets))[0]


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_of_ours_plans_on_the_tiny_world(recipe: str, world: Path):
    """Inputs stand before their consumers, and the target is last."""
    plan = plan_of(recipe, world)
    place = {step.name: n for n, step in enumerate(plan.steps)}
    assert all(place[source.name] < place[step.name] for step in plan.steps for source in step.inputs.values())
    last = f"@{len(plan.targets)}" if len(plan.targets) > 1 else ""
    assert plan.target.name == ("optimize" if recipe == "own_candidates" else "evaluate") + last


def test_own_candidates_enter_at_select(world: Path):
    """Nothing is sampled or ranked: the rewards are the user's."""
    plan = plan_of("own_candidates", world)
    assert [step.name for step in plan.steps if step.entry.name in ("sample", "reward", "compare")] == []
    assert plan.target.inputs["init"].entry.name == "untrained"


def test_a_recipe_is_laid_over_its_base_and_says_only_what_differs(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(
        "about: base\nshards: 3\ntarget: b\nb: {use: x, from: {i: a}, with: {n: 1, m: 2}}"
    )
    made = load(tmp_path, "extends: base\nabout: mine\nb: {with: {n: 9}}")
    assert (made.about, made.shards, made.target, made.name) == ("mine", 3, "b", "recipe")
    assert made.steps == {"b": {"use": "x", "from": {"i": "a"}, "with": {"n": 9, "m": 2}}}


def test_a_world_stands_between_base_and_recipe(tmp_path: Path):
    """What a method says of itself outranks what a world says of all methods; later worlds outrank earlier ones."""
    (tmp_path / "base.yaml").write_text("a: {with: {base: 1, world: 1, method: 1}}")
    (tmp_path / "one.yaml").write_text("a: {with: {world: 2, method: 2}}\nonly_here: {with: {n: 1}}")
    (tmp_path / "two.yaml").write_text("a: {with: {world: 3}}")
    worlds = (tmp_path / "one.yaml", tmp_path / "two.yaml")
    made = load(tmp_path, "extends: base\na: {with: {method: 4}}", "a.base=5", overlays=worlds)
    assert options(made, "a") == {"base": 5, "world": 3, "method": 4}
    assert options(made, "only_here") == {"n": 1}


def test_a_recipe_may_extend_a_method_which_extends_a_base(tmp_path: Path):
    """Base, world, method, one's own: each outranks those before it; what a name means is asked beside who says it."""
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "base.yaml").write_text("a: {with: {base: 1, world: 1, method: 1, own: 1}}\nb: {use: x, from: {i: a}}")
    (ours / "method.yaml").write_text("about: m\nextends: base\na: {with: {method: 3, own: 3}}")
    (tmp_path / "base.yaml").write_text("a: {with: {not_read: 1}}")
    (tmp_path / "demo.yaml").write_text("a: {with: {world: 2, method: 2, own: 2}}")
    own = tmp_path / "own.yaml"
    own.write_text("extends: method\na: {with: {own: 4}}\nb: {from: {i: null}}")
    made = load_recipe(own, (tmp_path / "demo.yaml",), library=(ours,))
    assert options(made, "a") == {"base": 1, "world": 2, "method": 3, "own": 4}
    assert made.steps["b"] == {"use": "x", "from": {"i": None}}
    assert (made.name, made.about) == ("own", "m")


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ({"own": "a", "a": "b", "b": "c", "c": ""}, "own -> a -> b -> c is more than 3 files; extend b instead"),
        ({"own": "a", "a": "own"}, "a circle: own -> a -> own"),
        ({"own": "methd", "method": ""}, "no recipe 'methd' in .*; did you mean 'method'?"),
    ],
)
def test_what_is_extended_is_there_and_near_and_no_circle(tmp_path: Path, links: dict[str, str], words: str):
    for name, extended in links.items():
        (tmp_path / f"{name}.yaml").write_text(f"extends: {extended}\na: {{}}" if extended else "a: {}")
    with pytest.raises(WinnowError, match=f"extends: {words}"):
        load_recipe(tmp_path / "own.yaml")


def test_null_removes_a_wire(world: Path):
    """dpo.yaml says `selections: null`: its reference has no such input, while rso's has."""
    inputs = {
        name: {step.name: step for step in plan_of(name, world).steps}["reference"].inputs for name in ("dpo", "rso")
    }
    assert set(inputs["dpo"]) == {"prompts", "candidates", "policy"}
    assert set(inputs["rso"]) == {"prompts", "candidates", "policy", "selections"}


def test_a_step_with_another_use_starts_afresh(tmp_path: Path):
    """Options of the stage that stood there before would be unknown to the new one."""
    (tmp_path / "base.yaml").write_text("a: {use: x, from: {i: b}, with: {old: 1}}")
    assert load(tmp_path, "extends: base\na: {use: y, with: {new: 1}}").steps["a"] == {"use": "y", "with": {"new": 1}}


def test_a_function_with_another_name_starts_afresh(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("a: {with: {f: {name: hinge, delta: 1.0}}}")
    assert options(load(tmp_path, "extends: base\na: {with: {f: {name: nll}}}"), "a") == {"f": {"name": "nll"}}
    same = load(tmp_path, "extends: base\na: {with: {f: {name: hinge, gamma: 2.0}}}")
    assert options(same, "a") == {"f": {"name": "hinge", "delta": 1.0, "gamma": 2.0}}


@pytest.mark.parametrize(
    ("written", "value"),
    [("5e-7", 5e-7), ("1e-3", 1e-3), ("1E3", 1000.0), ("-2.5e+2", -250.0), (".5", 0.5), ("3.", 3.0), (".inf", math.inf),
     ("-.inf", -math.inf), ("1.0e-2", 0.01), ("+4e1", 40.0)],
)  # fmt: skip
def test_numbers_read_as_yaml_1_2_has_them(tmp_path: Path, written: str, value: float):
    """Plain PyYAML reads 5e-7 as text; in a recipe and in --set it is a number."""
    found = options(load(tmp_path, f"a: {{with: {{learning_rate: {written}}}}}", f"a.again={written}"), "a")
    assert found == {"learning_rate": value, "again": value}
    assert all(type(number) is float for number in found.values())


@pytest.mark.parametrize("written", ["1e", "e5", "1.2.3", "5", "v1e3", "'1e3'"])
def test_what_is_no_float_is_not_made_one(tmp_path: Path, written: str):
    assert type(options(load(tmp_path, f"a: {{with: {{x: {written}}}}}"), "a")["x"]) is not float


def test_dot_slash_is_beside_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever the command runs; the same words in another folder's overlay mean that folder."""
    (tmp_path / "world").mkdir()
    overlay = tmp_path / "world" / "w.yaml"
    overlay.write_text("b: {with: {path: ./data.jsonl}}")
    monkeypatch.chdir("/")
    made = load(tmp_path, "a: {with: {path: ./data.jsonl, plain: data.jsonl}}", overlays=(overlay,))
    assert options(made, "a") == {"path": str(tmp_path / "data.jsonl"), "plain": "data.jsonl"}
    assert options(made, "b") == {"path": str(tmp_path / "world" / "data.jsonl")}


def test_set_reaches_into_nested_options(tmp_path: Path):
    text = "a: {with: {f: {name: hinge, delta: 1.0}, n: 1}}\nb: {}\ntarget: a"
    made = load(tmp_path, text, "a.f.delta=2.5", "b.list=[x, y]", "b.none=null", "target=b", "shards=5")
    assert options(made, "a") == {"f": {"name": "hinge", "delta": 2.5}, "n": 1}
    assert options(made, "b") == {"list": ["x", "y"], "none": None}
    assert (made.target, made.shards) == ("b", 5)


def test_set_opens_a_function_given_by_name(world: Path):
    """`objective: sigmoid_norm` and --set optimize.objective.beta=0.3 make {name: sigmoid_norm, beta: 0.3}."""
    assert plan_of("rso", world, "optimize.objective.beta=0.3").target.inputs
    policy = {step.name: step for step in plan_of("rso", world, "optimize.objective.beta=0.3").steps}["optimize"]
    assert policy.options["objective"].name == "sigmoid_norm"
    assert policy.options["objective"].options["beta"] == 0.3


def test_set_keeps_the_files_of_others_unchanged(tmp_path: Path):
    """Two loads of one file: the override of the first does not leak into the second."""
    text = "a: &same {with: {n: 1}}\nb: *same"
    assert options(load(tmp_path, text, "a.n=2"), "b") == {"n": 1}
    assert options(load(tmp_path, text), "a") == {"n": 1}


def test_a_run_is_named_for_its_recipe_and_overrides(tmp_path: Path):
    assert load(tmp_path, "a: {with: {n: 1}}", "a.n=2").name == "recipe[a.n=2]"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("k", ["--set k", "step.option=value"]),
        ("a.k", ["--set a.k", "step.option=value"]),
        ("a=1", ["--set a=1", "step.option=value"]),
        ("sharsd=4", ["--set sharsd=4", "did you mean 'shards'?"]),
        ("extends=x", ["--set extends=x", "known: about, rounds, shards, target"]),
        ("a.=1", ["--set a.=1", "step.option=value"]),
        (".k=1", ["--set .k=1", "step.option=value"]),
        ("selct.k=1", ["--set selct.k=1", "unknown step 'selct'", "did you mean 'select'?"]),
        ("select.k=[", ["--set select.k=[", "not YAML"]),
        ("select.k={a: 1, a: 2}", ["--set select.k=", "'a' stands twice"]),
        ("select.k.x=1", ["--set", "k is 8"]),
        ("select.when=2026-02-31", ["--set select.when=2026-02-31"]),
    ],
)
def test_a_senseless_override_is_refused(tmp_path: Path, assignment: str, words: list[str]):
    with pytest.raises(WinnowError) as caught:
        load(tmp_path, "a: {}\nselect: {with: {k: 8}}", assignment)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: {with: {t: \xff}}", ["cannot be read", "utf-8"]),
        (b"a: {with: [}", ["not YAML", "line 1"]),
        (b"- a\n- b", ["must be a mapping of step names, got list"]),
        (b"", ["must be a mapping of step names, got NoneType"]),
        (b"a: {}\nb: {}\na: {}", ["'a' stands twice"]),
        (b"a: {with: {n: 1, n: 2}}", ["line 1", "'n' stands twice"]),
        (b"a: 1\n---\nb: 2", ["not YAML"]),
        (b"a: !!python/object/apply:os.getcwd []", ["not YAML"]),
        (b"extends: nowhere", ["extends: no recipe", "nowhere"]),
        (b"extends: recipe", ["extends: a circle: recipe -> recipe"]),
        (b"shards: many", ["shards must be int, got 'many'"]),
        (b"shards: true", ["shards must be int, got True"]),
        (b"shards: 0", ["shards must be from 1"]),
        (b"target: [a]", ["target must be str"]),
        (b"a: 3", ["a: must be a mapping with use, like, from, with; got 3"]),
        (b"a: {wiht: {n: 1}}", ["a.wiht: unknown; did you mean 'with'?"]),
        (b"a: {with: 3}", ["a.with: must be a mapping, got 3"]),
        (b"a: {from: [b]}", ["a.from: must be a mapping"]),
        (b"a: {from: {i: [b]}}", ["a.from.i: must be the name of a step", "['b']"]),
        (b"a: {use: [b]}", ["a.use: must be the name of a stage"]),
    ],
    ids=lambda value: value.decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_a_file_that_is_no_recipe_is_refused_in_words(tmp_path: Path, content: bytes, words: list[str]):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(WinnowError) as caught:
        load_recipe(file)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(("name", "words"), [("gone.yaml", "there is no such file in"), ("folder.yaml", "is a folder")])
def test_a_file_that_is_not_there_is_named_as_what_it_was_given_as(tmp_path: Path, name: str, words: str):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "recipe.yaml").write_text("a: {}")
    with pytest.raises(WinnowError, match=f"^recipe .*{name}: {words}"):
        load_recipe(tmp_path / name)
    with pytest.raises(WinnowError, match=f"^--config .*{name}: {words}"):
        load_recipe(tmp_path / "recipe.yaml", (tmp_path / name,))


def test_all_malformed_steps_are_reported_at_once(tmp_path: Path):
    with pytest.raises(WinnowError) as caught:
        load(tmp_path, "shards: no\na: 3\nb: {whit: {}}\nc: {from: 1, with: 2}")
    assert len(caught.value.problems) == 5


def test_an_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(WinnowError, match="unknown recipe 'raff'; did you mean 'raft'"):
        recipes.recipe_path("raff")


def test_mistakes_of_several_recipes_come_together(tmp_path: Path):
    """`winnow run a b` says what is wrong with both before anything runs."""
    (tmp_path / "a.yaml").write_text("target: x")
    (tmp_path / "b.yaml").write_text("target: y")
    with pytest.raises(WinnowError) as caught:
        recipes.plans([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], [], [])
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [str(tmp_path / f"{n}.yaml") for n in "ab"]


def test_every_recipe_says_what_it_is():
    """The name of the method and where it comes from, in one line."""
    for name in recipes.names():
        assert load_recipe(recipes.recipe_path(name)).about, name


def test_the_same_recipe_makes_the_same_plan_from_any_folder(world: Path, monkeypatch: pytest.MonkeyPatch):
    keys = [step.key for step in plan_of("rso", world).steps]
    monkeypatch.chdir(world)
    again = make_plan(load_recipe(recipes.recipe_path("rso"), (Path("demo.yaml"),)))
    assert [step.key for step in again.steps] == keys


def test_a_step_like_another_says_only_what_differs(tmp_path):
    """use, from and with come from the other step, --set included; its own parts lie over them."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "target: b\n"
        "a: {use: sample, from: {prompts: p, policy: m}, with: {n: 8, seed: 1}}\n"
        "b: {like: a, from: {policy: other}, with: {seed: 2}}\n"
        "c: {like: b, with: {n: 3}}\n"
    )
    steps = load_recipe(path, sets=("a.max_tokens=5", "a.seed=7")).steps
    assert steps["b"] == {
        "use": "sample",
        "from": {"prompts": "p", "policy": "other"},
        "with": {"n": 8, "seed": 2, "max_tokens": 5},
    }
    assert steps["c"]["with"] == {"n": 3, "seed": 2, "max_tokens": 5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {like: bb}\nb: {use: sample}\n", "a.like: no step 'bb' in this recipe; did you mean 'b'?"),
        ("a: {like: b}\nb: {like: a}\n", "a.like: a circle"),
        ("a: {like: a}\n", "a.like: a circle"),
        ("a: {like: [b]}\nb: {use: sample}\n", "a.like: no step ['b']"),
    ],
)
def test_a_step_like_nothing_is_refused(tmp_path, text, said):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(WinnowError) as caught:
        load_recipe(path)
    assert said in str(caught.value)


def test_a_round_that_changes_a_step_changes_what_is_like_it_and_nothing_that_says_otherwise(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "target: b\n"
        "rounds: [{}, {a: {with: {n: 4}}}]\n"
        "a: {use: sample, with: {n: 8}}\n"
        "b: {like: a, with: {seed: 2}}\n"
        "c: {like: a, with: {n: 1}}\n"
    )
    steps = load_recipe(path).steps
    assert [steps[name]["with"]["n"] for name in ("a@1", "b@1", "a@2", "b@2", "c")] == [8, 8, 4, 4, 1]
