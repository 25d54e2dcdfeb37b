"""What a run will cost, before it runs: exact where it has run, else marked; and what cannot fit is refused."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import recipes
from jobs import winnow as python
from pipeline.config.estimates import as_rows, finished_manifests, step_costs
from pipeline.costs import GIB, UNKNOWN, Amount, Device
from pipeline.resources import Profile, Resources
from pipeline.store.fingerprints import DataPath
from pipeline.store.store import Store
from schemas import Model
from stages.model_config import ModelConfig
from stages.work import most_rows

MACHINE = Device("cpu", 16 * GIB)


def plan_of(data_dir: Path, *sets: str):
    return recipes.plans(["rso"], [data_dir / "demo.yaml"], list(sets))[0]


def costs_of(plan, store: Path | None, profile: Profile = Profile()):  # noqa: B008 - frozen
    costs = step_costs(plan, Store(store) if store else None, profile, local=True, machine=MACHINE)
    return {cost.step.name: cost for cost in costs}


def test_amounts_are_known_as_well_as_what_they_are_made_of():
    """A bound of a bound is a bound, a bound of an estimate may be exceeded, and of the unknown nothing is known."""
    bound, estimate = Amount(10, "at most"), Amount(3, "estimated")
    assert Amount(2).times(bound) == Amount(20, "at most")
    assert Amount(2).times(3) == Amount(6)
    assert estimate.times(bound) == Amount(30, "at most about")
    assert estimate.plus(Amount(1)) == Amount(4, "estimated")
    assert bound.times(UNKNOWN) == bound.plus(UNKNOWN) == UNKNOWN


def test_counts_of_what_is_finished_are_those_of_the_tables(data_dir: Path, finished: Path):
    """Rows and tokens of every manifest; nothing is estimated where the store has all of it."""
    store, costs = Store(finished), costs_of(plan_of(data_dir), finished)
    for cost in costs.values():
        manifest = store.folder(cost.step).manifest
        assert cost.is_finished
        assert {name: rows.value for name, rows in cost.work.rows.items()} == manifest["rows"]
        assert {rows.known for rows in cost.work.rows.values()} <= {"exactly"}
    assert costs["sample"].work.units == Amount(store.folder(costs["sample"].step).manifest["counters"]["tokens"])


def test_before_anything_has_run_there_are_bounds_and_no_times(data_dir: Path, tmp_path: Path):
    """24 lines, of which about 0.6 train, 8 draws each, of 24 tokens at most; nobody has measured a rate."""
    costs = costs_of(plan_of(data_dir), tmp_path)
    assert costs["prompts"].work.of("prompts") == Amount(24, "at most")
    rows = costs["sample"].work.of("candidates")
    assert (rows.known, rows.value) == ("at most about", pytest.approx(24 * 0.6 * 8))
    assert costs["sample"].work.units.value == pytest.approx(24 * rows.value)
    assert costs["select"].work.of("selections").value == pytest.approx(rows.value / 2)
    assert costs["optimize"].work.units.value > 0
    assert {cost.seconds for cost in costs.values()} == {UNKNOWN}


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.jsonl", '{"prompt": "x"}\n' * 60, 60),
        ("b.jsonl", '{"prompt": "x"}\n{"prompt": "y"}', 2),
        ("c.csv", "prompt\nx\ny\n", 2),
        ("d.csv", "", 0),
    ],
)
def test_a_file_has_at_most_as_many_rows_as_lines_below_its_header(tmp_path: Path, name: str, text: str, rows: int):
    (tmp_path / name).write_text(text)
    assert most_rows(DataPath(str(tmp_path / name))) == rows


def test_what_the_store_has_run_is_the_best_estimate_of_what_it_has_not(data_dir: Path, finished: Path):
    """Twice the draws, nothing of which is there: prompts by count, tokens per draw and rate as measured, marked so."""
    store, costs = Store(finished), costs_of(plan_of(data_dir, "sample.n=16"), finished)
    before = costs_of(plan_of(data_dir), finished)["sample"]
    train = before.work.of("candidates").value
    sample = costs["sample"]
    assert not sample.is_finished
    assert sample.work.of("candidates").known == "at most"
    assert sample.work.of("candidates").value >= 2 * train
    assert sample.work.units.known == "estimated"
    assert sample.work.units.value == pytest.approx(2 * before.work.units.value, rel=0.1)
    manifest = store.folder(before.step).manifest
    assert (sample.rate, sample.source) == (manifest["counters"]["tokens"] / manifest["seconds"], "measured")
    assert sample.seconds.value == pytest.approx(sample.work.units.value / sample.rate)
    assert costs["pair"].work.of("pairs").known == "at most about"


def test_an_estimate_is_of_the_step_whose_inputs_are_the_same(data_dir: Path, finished: Path):
    """Another ranker reads other responses, whatever its options."""
    store = Store(finished)
    manifests = finished_manifests(store)
    judge = next(manifest for manifest in manifests if manifest["stage"] == "judge")
    inputs = judge["identity"]["inputs"] | {"ranker": "f" * 16}
    other = judge | {"key": "0" * 16, "identity": judge["identity"] | {"inputs": inputs}}
    other |= {"counters": {"ranker_calls": 2}, "made": "2999-01-01T00:00:00+00:00"}
    plan = plan_of(data_dir, "eval_sample.seed=7")
    alone, beside = (
        step_costs(plan, store, Profile(), local=True, machine=MACHINE, manifests=known)
        for known in (manifests, [other, *manifests, other])
    )
    units = [cost.work.units for costs in (alone, beside) for cost in costs if cost.step.name == "judge"]
    assert units[0] == units[1]
    assert (units[0].value or 0) > 2


def test_a_given_rate_outranks_the_measured_and_devices_divide_the_time(data_dir: Path, finished: Path):
    profile = Profile(rates={"sample": 100.0}, stages={"sample": Resources(gpus=1, max_workers=4)})
    sample = costs_of(plan_of(data_dir, "sample.n=16"), finished, profile)["sample"]
    assert (sample.rate, sample.source, sample.devices) == (100.0, "given", 4)
    assert sample.seconds.value == pytest.approx(sample.work.units.value / 400)


def test_the_device_is_what_the_profile_says_and_else_the_machine(data_dir: Path, tmp_path: Path):
    profile = Profile(
        default=Resources(gpus=0, memory=2),
        stages={"optimize": Resources(gpus=1, gpu_memory=80), "sample": Resources(gpus=0)},
    )
    costs = costs_of(plan_of(data_dir), tmp_path, profile)
    assert costs["optimize"].device == Device("cuda", 80 * GIB)
    assert costs["reward"].device == Device("cpu", 2 * GIB)
    assert costs["sample"].device == MACHINE
    remote = step_costs(plan_of(data_dir), None, Profile(), local=False)
    assert {cost.device.memory for cost in remote} == {None}


@pytest.mark.parametrize(
    ("sets", "step"),
    [("sample.engine=vllm", "sample: engine"), ("compare.by={name: llm_judge, engine: vllm}", "compare: by.engine")],
)
def test_vllm_on_a_cpu_is_refused_heads_that_it_has_no_attention_for(data_dir: Path, sets: str, step: str):
    """Four heads of 16 numbers: on this machine, or where a profile says so; nobody knows what a cluster has."""
    plan = plan_of(data_dir, "base.heads=4", sets)

    def problems(profile: Profile, local: bool, machine: Device = MACHINE):
        return [cost.problem for cost in step_costs(plan, None, profile, local=local, machine=machine) if cost.problem]

    on_cpu = Profile(default=Resources(gpus=0))
    for profile, local in ((Profile(), True), (on_cpu, True), (on_cpu, False)):
        found = problems(profile, local)
        assert found
        assert all("heads of 16" in problem and "set `engine: transformers`" in problem for problem in found)
        assert any(problem.startswith(step) for problem in found)
    assert not problems(Profile(), False)
    assert not problems(Profile(), True, Device("cuda", 80 * GIB))
    assert not problems(Profile(default=Resources(gpus=1)), False)


def test_gpus_that_a_worker_would_not_compute_on_are_refused_when_the_plan_is_made(data_dir: Path):
    """vLLM computes on `tensor_parallel` times `pipeline_parallel_size`, torch on one, a program on none."""

    def refused(resources: Resources, *sets: str) -> set[str]:
        costs = costs_of(plan_of(data_dir, "sample.engine=vllm", *sets), None, Profile(default=resources))
        return {name for name, cost in costs.items() if "others would be idle" in cost.problem}

    assert refused(Resources(gpus=1)) == set()
    assert refused(Resources(gpus=2)) >= {"sample", "reference", "optimize"}
    two = refused(Resources(gpus=2, tensor_parallel=2))
    assert "sample" not in two
    assert two >= {"reference", "optimize"}
    assert "sample" not in refused(Resources(gpus=2), "sample.engine_options={pipeline_parallel_size: 2}")
    assert "prompts" not in refused(Resources(gpus=2))


def test_heads_of_a_folder_are_those_of_its_config(tiny: Model, tmp_path: Path):
    """`head_dim`, where the config has it; a family whose keys are latent has kernels of its own."""
    assert ModelConfig(tiny.folder).head_size == 32
    for numbers, size in (({"head_dim": 16}, 16), ({"num_attention_heads": 4}, 16), ({"kv_lora_rank": 8}, None)):
        content = json.loads((tiny.folder / "config.json").read_text()) | {"head_dim": None} | numbers
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert ModelConfig(tmp_path).head_size == size


@pytest.fixture
def small_card(tmp_path: Path) -> Path:
    """A profile of a GPU on which the demo's training does not fit at its pass of 8,192 tokens."""
    path = tmp_path / "card.yaml"
    path.write_text("optimize: {gpus: 1, gpu_memory: 0.05}\n")
    return path


def test_a_step_that_cannot_fit_is_refused_with_the_setting_that_would(winnow, data_dir: Path, small_card: Path):
    """By `plan`, after what it costs, and by `run` before anything is computed; the setting makes both go on."""
    words = ("rso", "--config", data_dir / "demo.yaml", "--profile", small_card)
    facts = ("optimize: needs about", "a GPU has 0.1 GiB", "`tokens_per_pass: ")
    for command in ("plan", "run"):
        code, text = winnow(command, *words)
        assert code == 2
        assert [fact for fact in facts if fact not in text] == [], text
    assert "GiB/device" in winnow("plan", *words)[1]
    assert not Path("store").exists()
    smaller = [item for name in ("sft", "ranker", "optimize") for item in ("--set", f"{name}.tokens_per_pass=256")]
    assert winnow("plan", *words, *smaller)[0] == 0


def test_a_network_whose_memory_is_not_estimated_is_said_so(winnow, data_dir: Path, tiny: Model, tmp_path: Path):
    """A mixture of experts: every step that holds it is named with the reason, and the plan stands."""
    folder = tmp_path / "moe"
    shutil.copytree(tiny.folder, folder)
    config = (folder / "config.json").read_text().replace("{", '{"num_local_experts": 4,', 1)
    (folder / "config.json").write_text(config)
    (tmp_path / "moe.yaml").write_text(f"sft: {{use: model, with: {{path: {folder}}}}}")
    code, out = winnow("plan", "raft", "--config", data_dir / "demo.yaml", "--config", tmp_path / "moe.yaml")
    assert code == 0, out
    (line,) = [line for line in " ".join(out.split()).split(". ") if "memory is not estimated" in line]
    assert "moe is a mixture of experts" in line
    for step in ("sample", "optimize", "eval_sample"):
        assert step in line
        assert any(row.strip().startswith(step) and "not estimated" in row for row in out.splitlines())


def test_the_table_of_costs_is_readable_in_80_columns(winnow, data_dir: Path):
    """A line per step that will run; signs are explained, and what a missing rate needs."""
    code, text = winnow("plan", "rso", "--config", data_dir / "demo.yaml")
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if "GiB/device" in line)
    end = next(n for n, line in enumerate(lines) if "at most about" in line)
    assert code == 0
    assert max(map(len, lines[start:end])) <= 80
    assert any(line.split()[0] == "sample" for line in lines[start + 2 : end] if line.strip())
    assert "`rates: {" in text
    assert "nothing finished here by" in text


def test_nothing_is_said_of_costs_where_all_is_finished(winnow, data_dir: Path, finished: Path):
    code, text = winnow("plan", "rso", "--config", data_dir / "demo.yaml", "--store", finished)
    assert (code, "GiB/device" in text) == (0, False)


def test_python_gets_the_same_numbers_as_plain_rows(data_dir: Path, finished: Path):
    plan = plan_of(data_dir, "sample.n=16")
    rows = {row["step"]: row for row in python.costs(plan, finished)}
    assert rows["sample"]["tokens"]["known"] == "estimated"
    assert rows["sample"]["memory"]["weights"] > 0
    assert rows.keys() == {row["step"] for row in as_rows(list(costs_of(plan, finished).values()))}


def test_no_torch_is_needed_to_say_what_training_takes(data_dir: Path):
    """A plan with its costs is made in a process that never loads torch."""
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from jobs import winnow\n"
        f"rows = winnow.costs(winnow.plan('rso', {str(data_dir / 'demo.yaml')!r}), '/nonexistent')\n"
        "assert any(row['memory'] for row in rows); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
