"""`reference` and `optimize` on a training machine without the rest: torch, transformers, pydantic, pyarrow, numpy."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.context import StageContext, WarmCache
from pipeline.store.fingerprints import DataPath
from stages.data.preferences import preferences

ROOT = Path(__file__).parents[3]
ALLOWED = (
    *("torch", "transformers", "safetensors", "pyarrow", "numpy", "pydantic", "pydantic_core", "annotated_types"),
    *("huggingface_hub", "yaml"),  # transformers cannot be imported without them
)

# Run by a fresh interpreter. Our code may import ALLOWED, itself and the standard library; what those
# packages import for themselves is not checked (the importing frame is in site-packages).
GUARD = """
import builtins, sys
ROOT, ALLOWED = {root!r}, {allowed!r}
OURS = ("schemas", "pipeline", "stages")
plain = builtins.__import__


def refused(name):
    top = name.partition(".")[0]
    return top not in ALLOWED and top not in OURS and top not in sys.stdlib_module_names


def is_ours(path):
    return path.startswith(ROOT) and "site-packages" not in path


class Refuse:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame and is_ours(frame.f_code.co_filename) and refused(name):
            raise ImportError("not on a bare machine: " + name)


def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and is_ours(str((globals or {{}}).get("__file__", ""))) and refused(name):
        raise ImportError("not on a bare machine: " + name)
    return plain(name, globals, locals, fromlist, level)


sys.meta_path.insert(0, Refuse())
builtins.__import__ = guarded  # also sees packages that a library has imported already
sys.path.insert(0, ROOT)
"""

SCRIPT = """
from pathlib import Path
import pyarrow.parquet as pq
from pipeline.registry import Bound
from pipeline.context import WarmCache, StageContext
from schemas import Model
from stages.training.examples import examples
from stages.training.objectives import objective
from stages.training.optimize import optimize
from stages.training.reference import reference

folder, init = Path(sys.argv[1]), Model(Path(sys.argv[2]), "digest")
names = ("prompts", "candidates", "pairs")
prompts, candidates, pairs = (pq.read_table(folder / (name + ".parquet")) for name in names)
ctx = StageContext(folder / "step", WarmCache(), lambda *progress: None)
scores = reference(prompts, candidates, init, ctx)
rows = examples(prompts, ctx, candidates, pairs, reference=scores)
bound = Bound(objective.entries["sigmoid_norm"], {"beta": 0.1, "smoothing": 0.0})
model, policy, metrics, _ = optimize(init, rows, ctx, objective=bound, learning_rate=1e-3, batch_size=4)
first = next(row["value"] for row in metrics.to_pylist() if row["metric"] == "loss")
print("first loss", round(first, 5), "steps", policy.to_pylist()[0]["steps"])
print("heavy", sorted({"datasets", "duckdb", "numba", "ray", "typer", "vllm"} & set(sys.modules)))
"""


def bare(code, *arguments):
    guard = GUARD.format(root=str(ROOT), allowed=ALLOWED)
    return subprocess.run(
        [sys.executable, "-c", guard + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd="/",
        check=False,
    )


def test_reference_and_optimize_run_on_a_bare_machine(tiny, data_dir, tmp_path):
    """Eight pairs from log-probs to a trained policy; the first loss is ln 2 = 0.69315."""
    ctx = StageContext(tmp_path, WarmCache(), lambda *progress: None)
    tables = preferences(tiny, ctx, path=DataPath(str(data_dir / "preferences.jsonl")), heldout=0.0)
    prompts = tables[0].slice(0, 8)
    names = set(prompts.column("prompt_id").to_pylist())
    for name, table in zip(("prompts", "candidates", "pairs"), (prompts, *tables[1:]), strict=True):
        mask = [prompt in names for prompt in table.column("prompt_id").to_pylist()]
        pq.write_table(table.filter(mask), tmp_path / f"{name}.parquet")
    done = bare(SCRIPT, tmp_path, tiny.folder)
    assert done.returncode == 0, done.stderr
    assert "first loss 0.69315 steps 2" in done.stdout
    assert "heavy []" in done.stdout
    assert any((tmp_path / "step" / "model").glob("*.safetensors"))


def test_the_guard_of_this_test_sees_our_imports():
    """The kernels need numba."""
    assert "not on a bare machine: numba" in bare("import stages.selection.kernels").stderr
