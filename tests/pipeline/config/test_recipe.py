"""From YAML to steps: each layer outranks those below it, and what cannot be read is reported in one line."""

import math
from pathlib import Path

import pytest

from jobs import recipes
from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe, load_recipe, merged
from pipeline.config.yaml import dump, parse
from schemas import WinnowError
from tests.conftest import write_jsonl


def load(folder: Path, text: str, *sets: str, overlays: tuple[Path, ...] = ()) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overlays, sets)


def options(recipe: Recipe, step: str) -> dict:
    return recipe.steps[step]["with"]


def own_candidates_config(folder: Path) -> Path:
    """Write two candidates per prompt with their rewards; an SFT policy of random weights, and a program to rank."""
    rows = [{"prompt": f"Book {n}.", "response": f"Booked {n} {k}.", "reward": k} for n in range(6) for k in range(2)]
    write_jsonl(folder / "own.jsonl", rows)
    config = folder / "own_candidates.yaml"
    config.write_text(
        "ranker: {use: brevity, with: {words: 2}}\n"
        "sft: {use: untrained, with: {corpus: ./own.jsonl, columns: [prompt, response], vocabulary: 400, context: 64}}"
    )
    return config


def plan_of(recipe: str, folder: Path, *sets: str, name: str | None = None) -> Plan:
    """Return the plan of one of our recipes on the tiny data; a name saves the plans without `sets` that seek one."""
    if recipe in recipes.OWN_CANDIDATES:
        needed = (
            "own_candidates.response=response",
            f"own_candidates.path={folder / 'own.jsonl'}",
            "optimize.learning_rate=0.001",
            "sample.max_tokens=16" if recipe == "own_completions" else "own_candidates.reward=reward",
        )
        return recipes.plans([recipe], [own_candidates_config(folder)], [*needed, *sets], name)[0]
    return recipes.plans([recipe], [folder / "demo.yaml"], list(sets), name)[0]


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_of_ours_plans_on_the_tiny_world(recipe: str, data_dir: Path):
    """Inputs come before their consumers, the target is last, and the method says what it is in one line."""
    plan = plan_of(recipe, data_dir)
    position = {step.name: n for n, step in enumerate(plan.steps)}
    assert all(position[source.name] < position[step.name] for step in plan.steps for source in step.inputs.values())
    last = f"@{len(plan.targets)}" if len(plan.targets) > 1 else ""
    ends_trained = recipe in ("kto_direct", "own_candidates")  # which name no prompts to evaluate on
    assert plan.target.name == ("optimize" if ends_trained else "evaluate") + last
    assert load_recipe(recipes.recipe_path(recipe)).about


def test_the_example_of_load_recipe_is_what_it_makes(tmp_path: Path):
    """The indented blocks of its docstring are a base, a recipe that extends it, and steps."""
    base, recipe, steps = (text for text in load_recipe.__doc__.split("\n\n") if text.startswith(" " * 8))
    (tmp_path / "base.yaml").write_text(base)
    loaded = load(tmp_path, "        extends: base\n" + recipe, "pair@2.seed=5").steps
    expected = parse(steps, "steps")
    assert {name: loaded[name] for name in expected} == expected
    assert loaded.keys() - expected == {"sft", "optimize@1", "optimize@2"}


def test_what_is_made_of_a_text_does_not_change_what_it_says():
    """A text is read once per process, and callers change what they get: each has its own."""
    first = parse("a: {b: [1, 2]}", "here")
    first["a"]["b"].append(3)
    assert parse("a: {b: [1, 2]}", "here") == {"a": {"b": [1, 2]}}


def test_own_candidates_enter_at_select(data_dir: Path):
    """Nothing is sampled or ranked: the rewards are the user's."""
    plan = plan_of("own_candidates", data_dir)
    assert [step.name for step in plan.steps if step.stage in ("sample", "reward", "compare")] == []
    assert plan.target.inputs["init"].stage == "untrained"


# Layers.


def test_a_recipe_is_laid_over_its_base_and_writes_only_what_differs(tmp_path: Path):
    """A step with another `use`, and a function with another name, start afresh: old options would be unknown there."""
    (tmp_path / "base.yaml").write_text(
        "about: base\nshards: 3\ntarget: b\nb: {use: x, from: {i: a}, with: {n: 1, m: 2, f: {name: hinge, delta: 1.0}}}"
    )
    recipe = load(tmp_path, "extends: base\nabout: mine\nb: {with: {n: 9, f: {name: hinge, gamma: 2.0}}}")
    assert (recipe.about, recipe.shards, recipe.target, recipe.name) == ("mine", 3, "b", "recipe")
    hinge = {"name": "hinge", "delta": 1.0, "gamma": 2.0}
    assert recipe.steps == {"b": {"use": "x", "from": {"i": "a"}, "with": {"n": 9, "m": 2, "f": hinge}}}
    recipe = load(tmp_path, "extends: base\nb: {use: y, with: {new: 1}}")
    assert recipe.steps["b"] == {"use": "y", "with": {"new": 1}}
    assert options(load(tmp_path, "extends: base\nb: {with: {f: {name: nll}}}"), "b")["f"] == {"name": "nll"}


def test_base_method_configs_and_own_recipe_each_outrank_those_before(tmp_path: Path):
    """Your files outrank ours; of yours a recipe, which is of one method, a config, which is of all; later configs
    outrank earlier ones. What a name means is looked up beside the file that says it."""
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "base.yaml").write_text("a: {with: {v: 1, w: 1, x: 1, y: 1, z: 1}}\nb: {use: x, from: {i: a}}")
    (ours / "method.yaml").write_text("about: m\nextends: base\na: {with: {y: 4, z: 4}}")
    (tmp_path / "base.yaml").write_text("a: {with: {not_read: 1}}")
    (tmp_path / "one.yaml").write_text("a: {with: {w: 2, x: 2, y: 2, z: 2}}\nonly_here: {with: {n: 1}}")
    (tmp_path / "two.yaml").write_text("a: {with: {x: 3, y: 3, z: 3}}")
    own = tmp_path / "own.yaml"
    own.write_text("extends: method\na: {with: {z: 5}}\nb: {from: {i: null}}")
    configs = (tmp_path / "one.yaml", tmp_path / "two.yaml")
    recipe = load_recipe(own, configs, ("a.v=6",), library=(ours,))
    assert options(recipe, "a") == {"v": 6, "w": 2, "x": 3, "y": 3, "z": 5}
    origins = {path: Path(origin.layer).name for path, origin in recipe.origins["a"].items()}
    assert origins == {"v": "--set", "w": "one.yaml", "x": "two.yaml", "y": "two.yaml", "z": "own.yaml"}
    assert options(recipe, "only_here") == {"n": 1}
    assert recipe.steps["b"] == {"use": "x", "from": {"i": None}}
    assert (recipe.name, recipe.about) == ("own[v=6]", "m")


def test_a_config_reaches_every_recipe_of_ours(data_dir: Path, tmp_path: Path):
    """Epochs, and how many candidates are kept wherever the rule has a k that does not make the method what it is."""
    config = tmp_path / "mine.yaml"
    config.write_text("optimize: {with: {epochs: 3}}\nselect: {with: {rule: {k: 4}}}")
    for name in ("rso", "ipo", "kto", "simpo", "rrhf"):
        (plan,) = recipes.plans([name], [data_dir / "demo.yaml", config], [])
        found = {step.name.partition("@")[0]: step.options for step in plan.steps}
        assert (found["optimize"]["epochs"], found["select"]["rule"].options["k"]) == (3, 4), name
    config.write_text("optimize: {with: {epochs: 3}}")
    for name in recipes.names():
        if name not in recipes.OWN_CANDIDATES:
            (plan,) = recipes.plans([name], [data_dir / "demo.yaml", config], [])
            epochs = {step.options["epochs"] for step in plan.steps if step.name.startswith("optimize")}
            assert epochs <= {3}, name


FIXED = "extends: base\na: {from: {i: b}, fixed: {f: {name: hinge}, mode: best}, with: {f: {delta: 2.0}, n: 8}}"


def layered(folder: Path, config: str, *sets: str, own: str = "") -> Recipe:
    """Return a shipped method that fixes a function, a mode and an input, under a config, or an own recipe over it."""
    (folder / "ours").mkdir(exist_ok=True)
    (folder / "ours" / "base.yaml").write_text("a: {use: x, from: {i: c}}\nb: {}\nc: {}\ntarget: a")
    (folder / "ours" / "method.yaml").write_text(FIXED)
    (folder / "my.yaml").write_text(config or "{}")
    (folder / "own.yaml").write_text("extends: method\n" + own)
    path = folder / "own.yaml" if own else folder / "ours" / "method.yaml"
    return load_recipe(path, (folder / "my.yaml",), sets, library=(folder / "ours",))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("a: {with: {f: ipo}}", ["a.f.name: ", "my.yaml says 'ipo'", "method.yaml", "'hinge'", "--set a.f.name=ipo"]),
        ("a: {with: {mode: worst}}", ["a.mode: ", "'worst'", "'best'"]),
        ("a: {from: {i: c}}", ["a.from.i: ", "'c'", "'b'", "recipe of your own that extends method"]),
        ("a: {use: y}", ["a.f.name: ", "None"]),
        ("recipes: {method: {a: {with: {mode: worst}}}}", ["a.mode: ", "recipes.method says 'worst'"]),
        ("rounds: [{}, {a: {with: {mode: worst}}}]", ["a.mode: ", "my.yaml, round 2 says 'worst'"]),
        ("recipes: {methd: {}}", ["recipes.methd: did you mean 'method'?"]),
    ],
)
def test_a_config_that_contradicts_what_makes_the_method_is_refused(tmp_path: Path, config: str, words: list[str]):
    with pytest.raises(WinnowError) as caught:
        layered(tmp_path, config)
    assert [word for word in words if word not in str(caught.value)] == []


def test_all_else_of_a_recipe_is_a_default_that_a_config_outranks(tmp_path: Path):
    """Options of another function do not apply, which is noted; `recipes` is for one recipe; --set and a recipe of
    one's own may change everything."""
    recipe = layered(tmp_path, "a: {with: {n: 4, f: {delta: 3.0}}}\nrecipes: {method: {a: {with: {n: 5}}}, base: {}}")
    assert options(recipe, "a") == {"f": {"name": "hinge", "delta": 3.0}, "mode": "best", "n": 5}
    assert recipe.notes == []
    assert (recipe.origins["a"]["n"].replaces, recipe.origins["a"]["f.delta"].replaces) == (8, 2.0)
    recipe = layered(tmp_path, "a: {with: {n: 4, f: {name: ipo, tau: 0.5}}}")
    assert options(recipe, "a") == {"f": {"name": "hinge", "delta": 2.0}, "mode": "best", "n": 4}
    (note,) = recipe.notes
    assert [word for word in ("a.f", "my.yaml", "ipo", "hinge") if word not in note] == []
    assert options(layered(tmp_path, "", "a.f=ipo"), "a")["f"] == "ipo"
    own = "a: {with: {f: {name: ipo}, mode: worst}}"
    assert options(layered(tmp_path, "a: {with: {n: 4}}", own=own), "a") == {
        "f": {"name": "ipo"},
        "mode": "worst",
        "n": 4,
    }


def test_a_config_outranks_the_rounds_of_a_recipe_also_as_one_file(tmp_path: Path):
    """`winnow submit` sends all files as one: what lies over an overlay here must not lie below it there."""
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "base.yaml").write_text("a: {with: {n: 1, m: 1}}\ntarget: a")
    (ours / "method.yaml").write_text("extends: base\nrounds: [{}, {a: {with: {n: 2, m: 2}}}]")
    (tmp_path / "my.yaml").write_text("a: {with: {n: 3}}")
    arguments = (ours / "method.yaml", (tmp_path / "my.yaml",))
    recipe = load_recipe(*arguments, library=(ours,))
    assert [options(recipe, f"a@{n}") for n in (1, 2)] == [{"n": 3, "m": 1}, {"n": 3, "m": 2}]
    assert recipe.origins["a@2"]["m"].layer == "method.yaml, round 2"
    (tmp_path / "packed.yaml").write_text(dump(merged(*arguments, (ours,))))
    assert load_recipe(tmp_path / "packed.yaml").steps == recipe.steps


def test_a_name_that_means_another_loss_elsewhere_is_pointed_out(data_dir: Path):
    """To users who write it, not of our own recipes; the papers' names mean one thing."""
    (plan,) = recipes.plans(["rso"], [data_dir / "demo.yaml"], [])
    assert plan.notes == []
    for name, words in (("sigmoid_norm", "length_normalized_dpo"), ("sigmoid", "TRL"), ("dpo", "")):
        (plan,) = recipes.plans(["rso"], [data_dir / "demo.yaml"], [f"optimize.objective={name}"])
        assert [words in note for note in plan.notes] == [True] * bool(words), name


def test_a_program_in_place_of_the_ranker_is_one_line(data_dir: Path, tmp_path: Path):
    """`use` names it, and every stage that ranks gets it: the keys of the long form. A misspelt name is refused."""
    short, long = tmp_path / "short.yaml", tmp_path / "long.yaml"
    short.write_text("ranker: {use: pattern, with: {regex: 'booked'}}")
    by = "{from: {ranker: null}, with: {by: {name: pattern, regex: booked}}}"
    long.write_text(f"reward: {by}\ncompare: {by}\njudge: {by}")
    plans = [recipes.plans(["rso"], [data_dir / "demo.yaml", config], [])[0] for config in (short, long)]
    assert [step.key for step in plans[0].steps] == [step.key for step in plans[1].steps]
    assert "ranker" not in {step.name for step in plans[0].steps}
    short.write_text("ranker: {use: patern, with: {regex: 'booked'}}")
    with pytest.raises(WinnowError, match=r"ranker\.use: unknown ranker 'patern'; did you mean 'pattern'"):
        recipes.plans(["rso"], [data_dir / "demo.yaml", short], [])


def without_evaluation(folder: Path) -> Path:
    """Write a policy of random weights and pairs: nothing of what only an evaluation reads."""
    rows = [{"prompt": f"Book {n}.", "chosen": f"Booked {n}.", "rejected": f"No {n}."} for n in range(8)]
    write_jsonl(folder / "pairs.jsonl", rows)
    config = folder / "pairs.yaml"
    config.write_text(
        "shards: 1\nsft: {use: untrained, with: {corpus: ./pairs.jsonl, columns: [prompt, chosen], vocabulary: 400, "
        "context: 64}}\npreferences: {with: {path: ./pairs.jsonl, heldout: 0.0}}\n"
        "optimize: {with: {learning_rate: 1.0e-3}}"
    )
    return config


def test_a_recipe_without_what_the_evaluation_reads_trains_and_says_so(tmp_path: Path, winnow):
    """In plan and run, with the names to give; asked for the evaluation, it is refused, as is one that lacks more."""
    config = without_evaluation(tmp_path)
    for command in ("plan", "run"):
        code, text = winnow(command, "dpo", "--config", config)
        text = " ".join(text.split())
        assert (code, "prompts.path and ranker.path are not given" in text) == (0, True)
        assert "evaluate is left out, and the run ends with optimize" in text
    assert "optimize" in winnow("ls", "dpo")[1]
    assert recipes.plans(["slic_direct"], [config], [])[0].target.name == "optimize"
    assert recipes.plans(["cvx_dpo"], [config], [])[0].target.name == "preference_head"
    packed = tmp_path / "packed.yaml"
    packed.write_text(dump(merged(recipes.recipe_path("dpo"), (config,), (recipes.FOLDER,))))
    assert recipes.plans([str(packed)], [], [])[0].target.name == "optimize"
    strict = tmp_path / "strict.yaml"
    strict.write_text("target: evaluate")
    packed.write_text(dump(merged(recipes.recipe_path("dpo"), (config, strict), (recipes.FOLDER,))))
    for recipe, sets in (("dpo", ["target=evaluate"]), (str(packed), []), ("rso", []), ("sft", [])):
        with pytest.raises(WinnowError, match=r"ranker\.path: required"):
            recipes.plans([recipe], [config], sets)


def test_unpaired_labels_train_in_one_line(tmp_path: Path, winnow):
    """TRL's prompt, completion, label. A prompt whose responses are all good says so: 0.5 divides, not their mean."""
    config = without_evaluation(tmp_path)
    rows = [
        {"prompt": f"Book {n}.", "completion": f"Booked {n} {k}.", "label": n % 2 == 0} for n in range(8) for k in "ab"
    ]
    write_jsonl(tmp_path / "labels.jsonl", rows)
    code, _ = winnow(
        "run", "kto_direct", "--config", config, "--set", f"own_candidates.path={tmp_path / 'labels.jsonl'}"
    )
    assert code == 0
    labels = "SELECT unnest(responses).desirable AS d FROM examples"
    sql = f"SELECT d, count(*) AS n FROM ({labels}) GROUP BY d ORDER BY d"
    assert winnow("sql", sql, "--format", "csv")[1].split() == ["d,n", "-1,8", "0,16", "1,8"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("extends: method", ["extends: only a recipe extends"]),
        ("extends: 3", ["extends: only a recipe extends"]),
        ("recipes: {method: {extends: base}}", ["extends: only a recipe extends"]),
        ("a: {from: c}", ["a.from", "mapping of inputs", "'c'"]),
        ("a: {from: [c]}", ["a.from", "mapping of inputs", "['c']"]),
        ("a: {from: {i: 3}}", ["a.from.i", "name of a step", "3"]),
        ("a: {with: [n]}", ["a.with", "mapping of options"]),
        ("a: {with: }", ["a.with", "mapping of options", "None"]),
        ("a:", ["a: must be a mapping", "None"]),
        ("a: []", ["a: must be a mapping", "[]"]),
        ("shards: null", ["shards", "integer", "None"]),
        ("about: 3", ["about", "string", "3"]),
        ("rounds: many", ["rounds", "'many'"]),
        ("rounds: [{a: {from: c}}]", ["rounds, entry 1: a.from", "'c'"]),
        ("plugins: good.py", ["plugins", "list", "'good.py'"]),
    ],
)
def test_a_mistake_in_one_layer_is_seen_also_where_another_one_lies_over_it(
    tmp_path: Path, config: str, words: list[str]
):
    for own in ("", "shards: 2\nabout: mine\na: {from: {i: c}, with: {n: 1}}"):
        with pytest.raises(WinnowError) as caught:
            layered(tmp_path, config, own=own)
        assert [word for word in (*words, "my.yaml") if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ({"own": "a", "a": "b", "b": "c", "c": ""}, "own -> a -> b -> c is more than 3 files; extend b instead"),
        ({"own": "a", "a": "own"}, "a cycle: own -> a -> own"),
        ({"own": "own"}, "a cycle: own -> own"),
        ({"own": "methd", "method": ""}, "no recipe 'methd' in .*; did you mean 'method'?"),
    ],
)
def test_what_is_extended_exists_and_is_near_and_makes_no_cycle(tmp_path: Path, links: dict[str, str], words: str):
    for name, extended in links.items():
        (tmp_path / f"{name}.yaml").write_text(f"extends: {extended}\na: {{}}" if extended else "a: {}")
    with pytest.raises(WinnowError, match=f"extends: {words}"):
        load_recipe(tmp_path / "own.yaml")


def test_null_removes_an_input(data_dir: Path):
    """dpo.yaml has `selections: null`: its reference has no such input, while rso's has."""
    dpo, rso = (
        next(step for step in plan_of(name, data_dir).steps if step.name == "reference").inputs
        for name in ("dpo", "rso")
    )
    assert set(rso) == {*dpo, "selections"} == {"prompts", "candidates", "policy", "selections"}


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path):
    """PyYAML has those of 1.1, where 010 is 8 and 5e-7 is text; what is written is read as it was."""
    values = {"5e-7": 5e-7, "1E3": 1000.0, "-2.5e+2": -250.0, ".5": 0.5, "3.": 3.0, ".inf": math.inf,
              "-.inf": -math.inf, "1.0e-2": 0.01, "+4e1": 40.0, "5": 5, "010": 10, "0o17": 15, "0x1F": 31, "-7": -7,
              "!!int 010": 10, "true": True, "False": False, "null": None, "~": None} | {text: text for text in (
              "1e", "e5", "1.2.3", "v1e3", "1:30", "on", "yes", "No", "1_000", "0b1", "2026-02-31", "=")}  # fmt: skip
    for text, value in values.items():
        read = options(load(tmp_path, f"a: {{with: {{x: {text}}}}}", f"a.y={text}"), "a")
        assert read == {"x": value, "y": value}
        assert [type(item) for item in read.values()] == [type(value)] * 2
        assert parse(dump(read), "dump") == read
    for text in ("5e-7", "010", "null", "true", "0o17", "<<", ".nan"):
        assert parse(dump({"a": text}), "dump") == {"a": text}


LAUGHS = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("b: 1\na: &a {b: *a}", ["line 2", "contains itself"]),
        ("b: &a [*a]", ["line 1", "contains itself"]),
        ("a: " + "[" * 3000, ["line 1", "100"]),
        ("a: " + "[" * 100_000, ["line 1", "100"]),
        (LAUGHS, ["line 6", "100,000"]),
        ("{[]: 1, []: 2}", ["line 1", "key"]),
        ("a: !!map [1]", ["line 1", "mapping"]),
        ("a: !!bool maybe", ["line 1", "'maybe'"]),
        ("a: !!set {b}", ["line 1", "set"]),
        ("a: 1\n3: {}", ["line 2", "key 3", "quote"]),
        ("null: {}", ["line 1", "key null", "quote"]),
        ("true: {}", ["line 1", "key true", "quote"]),
        ("a: {}\nb: {}\na: {}", ["line 3", "'a'", "twice"]),
        ("a: \x1b", ["character 3", "not allowed"]),
        ("a: [1", ["line 2", "expected"]),
    ],
)
def test_yaml_that_no_recipe_can_contain_is_refused_in_one_line(tmp_path: Path, text: str, words: list[str]):
    with pytest.raises(WinnowError) as caught:
        load(tmp_path, text)
    (problem,) = caught.value.problems
    assert problem.startswith(f"recipe {tmp_path / 'recipe.yaml'}: not YAML: ")
    assert [word for word in words if word not in problem] == []
    assert "\n" not in problem
    assert "unicode string" not in problem


def test_dot_slash_is_beside_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever the command runs; the same words in a config in another folder mean that folder."""
    (tmp_path / "data").mkdir()
    config = tmp_path / "data" / "c.yaml"
    config.write_text("b: {with: {path: ./data.jsonl}}")
    monkeypatch.chdir("/")
    recipe = load(tmp_path, "a: {with: {path: ./data.jsonl, plain: data.jsonl}}", overlays=(config,))
    assert options(recipe, "a") == {"path": str(tmp_path / "data.jsonl"), "plain": "data.jsonl"}
    assert options(recipe, "b") == {"path": str(tmp_path / "data" / "data.jsonl")}


def test_the_same_recipe_makes_the_same_plan_from_any_folder(data_dir: Path, monkeypatch: pytest.MonkeyPatch):
    keys = [step.key for step in plan_of("rso", data_dir).steps]
    monkeypatch.chdir(data_dir)
    again = make_plan(load_recipe(recipes.recipe_path("rso"), (Path("demo.yaml"),), library=(recipes.FOLDER,)))
    assert [step.key for step in again.steps] == keys


# --set.


def test_another_name_in_set_is_a_new_function(tmp_path: Path):
    """As in YAML: options of the one before do not apply. Options of --set do, whatever the order of the command."""
    text = "a: {with: {f: {name: hinge, delta: 1.0}, g: nll}}"
    for sets, expected in [
        (["a.f.name=plain"], {"name": "plain"}),
        (["a.f.name=hinge"], {"name": "hinge", "delta": 1.0}),
        (["a.f.k=4", "a.f.name=plain"], {"name": "plain", "k": 4}),
        (["a.f.k=4", "a.f=plain"], {"name": "plain", "k": 4}),
    ]:
        assert options(load(tmp_path, text, *sets), "a")["f"] == expected, sets
    assert options(load(tmp_path, text, "a.name=x"), "a") == {
        "f": {"name": "hinge", "delta": 1.0},
        "g": "nll",
        "name": "x",
    }


def test_set_reaches_into_nested_options_and_opens_a_function_given_by_name(tmp_path: Path):
    """`objective: nll` and --set a.g.k=0.3 make {name: nll, k: 0.3}. The files of the next load are unchanged."""
    text = (
        "a: {with: {f: {name: hinge, delta: 1.0}, g: nll, n: 1}}\nb: {}\ntarget: a\nc: &same {with: {n: 1}}\nd: *same"
    )
    sets = ("a.f.delta=2.5", "a.g.k=0.3", "b.list=[x, y]", "b.none=null", "c.n=2", "target=b", "shards=5")
    recipe = load(tmp_path, text, *sets)
    assert options(recipe, "a") == {"f": {"name": "hinge", "delta": 2.5}, "g": {"name": "nll", "k": 0.3}, "n": 1}
    assert options(recipe, "b") == {"list": ["x", "y"], "none": None}
    assert (options(recipe, "c"), options(recipe, "d")) == ({"n": 2}, {"n": 1})
    assert (recipe.target, recipe.shards) == ("b", 5)
    assert options(load(tmp_path, text), "c") == {"n": 1}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("k", ["--set k", "step.option=value"]),
        ("a.k", ["--set a.k", "step.option=value"]),
        ("a=1", ["--set a=1", "step.option=value"]),
        ("sharsd=4", ["--set sharsd=4", "did you mean 'shards'?"]),
        ("extends=x", ["--set extends=x", "known: about, dtype, evaluations, rounds"]),
        ("a.=1", ["--set a.=1", "step.option=value"]),
        ("shards=null", ["--set shards=null", "shards must have a value"]),
        ("target=", ["--set target=", "target must have a value"]),
        ("rounds=~", ["--set rounds=~", "rounds must have a value"]),
        (".k=1", ["--set .k=1", "step.option=value"]),
        ("selct.k=1", ["--set selct.k=1", "unknown step 'selct'", "did you mean 'select'?"]),
        ("select.k=[", ["--set select.k=[", "not YAML"]),
        ("select.k={a: 1, a: 2}", ["--set select.k=", "'a' is written twice"]),
        ("select.k.x=1", ["--set select.k.x=1", "k is 8"]),
    ],
)
def test_a_senseless_override_is_refused(tmp_path: Path, assignment: str, words: list[str]):
    with pytest.raises(WinnowError) as caught:
        load(tmp_path, "a: {}\nselect: {with: {k: 8}}", assignment)
    assert [word for word in words if word not in str(caught.value)] == []


# `like`.


def test_a_step_like_another_writes_only_what_differs(tmp_path: Path):
    """use, from and with come from the other step, --set included; its own keys lie over them."""
    text = (
        "target: b\n"
        "a: {use: sample, from: {prompts: p, policy: m}, with: {n: 8, seed: 1}}\n"
        "b: {like: a, from: {policy: other}, with: {seed: 2}}\n"
        "c: {like: b, with: {n: 3}}\n"
    )
    steps = load(tmp_path, text, "a.max_tokens=5", "a.seed=7").steps
    inputs, values = {"prompts": "p", "policy": "other"}, {"n": 8, "seed": 2, "max_tokens": 5}
    assert steps["b"] == {"use": "sample", "from": inputs, "with": values}
    assert steps["c"]["with"] == values | {"n": 3}


def test_a_round_that_changes_a_step_changes_what_is_like_it_and_nothing_that_says_otherwise(tmp_path: Path):
    text = (
        "target: b\n"
        "rounds: [{}, {a: {with: {n: 4}}}]\n"
        "a: {use: sample, with: {n: 8}}\n"
        "b: {like: a, with: {seed: 2}}\n"
        "c: {like: a, with: {n: 1}}\n"
    )
    steps = load(tmp_path, text).steps
    assert [steps[name]["with"]["n"] for name in ("a@1", "b@1", "a@2", "b@2", "c")] == [8, 8, 4, 4, 1]


# Mistakes.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: {with: {t: \xff}}", ["cannot be read", "utf-8"]),
        (b"a: {with: [}", ["not YAML", "line 1"]),
        (b"- a\n- b", ["must be a mapping of step names, got list"]),
        (b"", ["must be a mapping of step names, got NoneType"]),
        (b"a: {}\nb: {}\na: {}", ["'a' is written twice"]),
        (b"a: {with: {n: 1, n: 2}}", ["line 1", "'n' is written twice"]),
        (b"a: 1\n---\nb: 2", ["not YAML"]),
        (b"a: !!python/object/apply:os.getcwd []", ["not YAML"]),
        (b"shards: many", ["shards: must be a valid integer, got 'many'"]),
        (b"shards: true", ["shards: must be a valid integer, got True"]),
        (b"shards: 0", ["shards: must be greater than or equal to 1, got 0"]),
        (b"target: [a]", ["target: must be a valid string, got ['a']"]),
        (b"shrads: 3", ["shrads: must be a mapping with use, like, from, with; got 3", "did you mean 'shards'?"]),
        (b"a: {wiht: {n: 1}}", ["a.wiht: unknown key; did you mean 'with'?"]),
        (b"a: {with: 3}", ["a.with: must be a mapping", "got 3"]),
        (b"a: {from: [b]}", ["a.from: must be a mapping", "got ['b']"]),
        (b"a: {from: {i: [b]}}", ["a.from.i: must be the name of a step", "['b']"]),
        (b"a: {use: [b]}", ["a.use: must be the name of a stage, got ['b']"]),
        (b"a: {like: bb}\nb: {use: sample}", ["a.like: no step 'bb' in this recipe; did you mean 'b'?"]),
        (b"a: {like: b}\nb: {like: a}", ["a.like: a cycle: a -> b -> a"]),
        (b"a: {like: a}", ["a.like: a cycle: a -> a"]),
        (b"a: {like: [b]}\nb: {use: sample}", ["a.like: must be the name of a step, got ['b']"]),
    ],
    ids=lambda value: value.decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_a_file_that_is_not_a_recipe_is_refused_with_place_value_and_cure(tmp_path: Path, content: bytes, words):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(WinnowError) as caught:
        load_recipe(file)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(("name", "words"), [("gone.yaml", "there is no such file in"), ("folder.yaml", "is a folder")])
def test_a_file_that_does_not_exist_is_named_as_what_it_was_given_as(tmp_path: Path, name: str, words: str):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "recipe.yaml").write_text("a: {}")
    with pytest.raises(WinnowError, match=f"^recipe .*{name}: {words}"):
        load_recipe(tmp_path / name)
    with pytest.raises(WinnowError, match=f"^--config .*{name}: {words}"):
        load_recipe(tmp_path / "recipe.yaml", (tmp_path / name,))


def test_all_malformed_steps_and_all_mistakes_of_set_are_reported_at_once(tmp_path: Path):
    with pytest.raises(WinnowError) as caught:
        load(tmp_path, "shards: no\na: 3\nb: {whit: {}}\nc: {from: 1, with: 2}")
    assert len(caught.value.problems) == 5
    with pytest.raises(WinnowError) as caught:
        load(tmp_path, "select: {}", "selct.beta=1", "rewrd.x=2", "nonsense")
    assert len(caught.value.problems) == 3


def test_mistakes_of_several_recipes_come_together(tmp_path: Path):
    """`winnow run a b` reports what is wrong with both before anything runs."""
    (tmp_path / "a.yaml").write_text("target: x")
    (tmp_path / "b.yaml").write_text("target: y")
    with pytest.raises(WinnowError) as caught:
        recipes.plans([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], [], [])
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [str(tmp_path / f"{n}.yaml") for n in "ab"]
    with pytest.raises(WinnowError, match="unknown recipe 'raff', and no YAML file; did you mean 'raft'"):
        recipes.recipe_path("raff")
