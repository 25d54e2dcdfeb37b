"""A complete run whose candidates are vLLM's."""

import shutil

import pyarrow.compute as pc

from pipeline.store.store import Store
from schemas.tables import CANDIDATES, EVALUATIONS
from tests.runs import SHORT, run_recipe

BASELINE = "eval_baseline.engine=transformers"  # as in RSO's run, which has drawn it


def test_the_pipeline_runs_on_real_vllm(data_dir, finished, tmp_path):
    """From the SFT policy, as it was saved here, to a measured one: 6 draws per prompt, all seeds different."""
    root = tmp_path / "store"
    shutil.copytree(finished, root)
    plan, _ = run_recipe(data_dir, root, "rso", "sample.engine=vllm", "sample.n=6", BASELINE, *SHORT)
    folders = {step.name: Store(root).folder(step) for step in plan.steps}
    candidates = folders["sample"].read(CANDIDATES)
    assert set(pc.value_counts(candidates.column("prompt_id")).field("counts").to_pylist()) == {6}
    assert len(set(candidates.column("seed").to_pylist())) == candidates.num_rows
    assert pc.all(pc.less_equal(candidates.column("logp"), 0)).as_py()
    metrics = folders["evaluate"].read(EVALUATIONS).column("metric").to_pylist()
    assert {"proxy_win", "gold_win", "kl", "n_tokens"} <= set(metrics)
