"""Methods and seeds of steps: what a key would be without seeds, of the step itself and of all behind it."""

import json
from pathlib import Path

import pytest

from pipeline.sql.catalog import open_catalog, query
from pipeline.sql.replicates import method_keys, seeds_of, without_seeds
from pipeline.store.store import Store
from schemas import WinnowError
from tests.catalogs import link, put
from tests.runs import plan_of


def finished_step(key: str, inputs: dict[str, str], **options) -> dict:
    return {"key": key, "stage": "toy", "identity": {"version": 1, "options": options, "inputs": inputs}}


def test_seeds_are_those_of_stages_and_registered_functions():
    """At any depth; not those of another library, such as vLLM's `seed`, nor text that is called so."""
    judge = {"name": "llm_judge", "version": 2, "seed": 3, "inner": {"name": "x", "version": 1, "seed": 4}}
    options = {"seed": 1, "rule": judge, "all": [judge], "engine_options": {"seed": 9}, "deep": {"x": {"seed": 8}}}
    assert dict(seeds_of(options)) == {
        "seed": 1, "rule.seed": 3, "rule.inner.seed": 4, "all.0.seed": 3, "all.0.inner.seed": 4,
    }  # fmt: skip
    plain = {"name": "llm_judge", "version": 2, "inner": {"name": "x", "version": 1}}
    rest = {"rule": plain, "all": [plain], "engine_options": {"seed": 9}, "deep": {"x": {"seed": 8}}}
    assert without_seeds(options) == rest
    assert without_seeds({"seed": "text"}) == {"seed": "text"}


def test_steps_that_differ_in_seeds_anywhere_behind_them_are_one_method():
    """Whatever else differs, in the step or behind it, makes another one; so does an input that is not finished."""
    steps = [
        *(finished_step(f"draw{n}", {"model": "gone"}, seed=n, k=8) for n in range(2)),
        *(finished_step(f"train{n}", {"rows": f"draw{n}"}, seed=5 * n) for n in range(2)),
        finished_step("other_draw", {"model": "gone"}, seed=0, k=9),
        finished_step("other_train", {"rows": "other_draw"}, seed=0),
        finished_step("other_model", {"model": "gone too"}, seed=0, k=8),
    ]
    methods = method_keys(steps)
    assert methods["draw0"] == methods["draw1"]
    assert methods["train0"] == methods["train1"]
    assert len({methods[key] for key in ("draw0", "train0", "other_draw", "other_train", "other_model")}) == 5


def test_steps_that_name_each_other_are_a_damaged_store():
    with pytest.raises(WinnowError, match=r"a -> b -> a|b -> a -> b"):
        method_keys([finished_step("a", {"x": "b"}), finished_step("b", {"x": "a"})])


def test_runs_have_the_method_and_all_seeds_of_each_finished_step(tmp_path: Path):
    """By the names of the run's steps, rounds included; also of one run or round; null for what is not finished."""
    store = Store(tmp_path / "store")
    put(store, "sample", "1", [], identity={"version": 1, "options": {"seed": 7}, "inputs": {}})
    for key, seed in (("2", 0), ("3", 1)):
        put(store, "optimize", key, [], identity={"version": 1, "options": {"seed": seed}, "inputs": {"rows": "1"}})
    for run, key in (("a", "2"), ("b", "3")):
        link(store, run, sample=("sample", "1"), **{"optimize@1": ("optimize", key), "evaluate": ("evaluate", "9")})
    sql = "SELECT run, method, seeds FROM runs WHERE stage = $stage ORDER BY run"
    first, second = query(open_catalog(store), sql.replace("$stage", "'optimize'")).to_pylist()
    assert first["method"] == second["method"] is not None
    assert [json.loads(row["seeds"]) for row in (first, second)] == [
        {"optimize@1.seed": seed, "sample.seed": 7} for seed in (0, 1)
    ]
    later = query(open_catalog(store), sql.replace("$stage", "'evaluate'")).to_pylist()
    assert [(row["method"], row["seeds"]) for row in later] == [(None, None)] * 2
    one = query(open_catalog(store, "b", 1), sql.replace("$stage", "'optimize'")).to_pylist()
    assert one == [second]


def test_every_seed_of_a_recipe_is_one_of_its_replicates(data_dir: Path):
    """Plans of RSO that differ in any one seed are one method; another beta is another."""

    def method(*sets: str) -> str:
        plan = plan_of(data_dir, *sets)
        steps = [{"key": step.key, "stage": step.stage, "identity": step.identity} for step in plan.steps]
        return method_keys(steps)[plan.target.key]

    plan = plan_of(data_dir)
    seeds = [f"{step.name}.{path}" for step in plan.steps for path, _ in seeds_of(step.identity["options"])]
    assert {"sft.seed", "sample.seed", "optimize.seed", "eval_baseline.seed", "evaluate.seed"} <= set(seeds)
    assert {method(f"{seed}=77") for seed in seeds} == {method()}
    assert method("select.rule.beta=0.1") != method()
