"""Imports only go down, and what is heavy stays where it belongs: planning needs none of it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["schemas", "pipeline", "stages", "jobs"]
FILES = [path.relative_to(ROOT) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
RAY = {f"pipeline/execution/{name}.py" for name in ("actors", "distributed", "ray_executor")} | {"jobs/ray_jobs.py"}
VLLM = {"stages/sampling/engines/vllm.py"}
TORCH = {"stages/head/convex.py"}
TORCH |= {
    f"stages/network/{name}.py"
    for name in (
        "device",
        "forward",
        "heap",
        "layout",
        "lm_head",
        "load",
        "local",
        "lora",
        "models",
        "packing",
        "prefix_attention",
    )
}
TORCH |= {"stages/network/router.py", "stages/network/working_weights.py"}
TORCH |= {
    f"stages/training/{name}.py"
    for name in (
        "checkpoints",
        "distributed",
        "objectives",
        "sharded",
        "terms",
        "throughput",
        "trackers",
        "trainer",
        "validation",
    )
}
TORCH |= {f"stages/sampling/engines/{name}.py" for name in ("__init__", "steering", "transformers", "vllm")}
TORCH |= {"stages/ranking/pairwise.py"}
HEAVY = ["torch", "transformers", "vllm", "ray", "numba"]


def modules_in(tree: ast.AST) -> Iterator[str]:
    """Names of all imported modules, wherever they are imported, by statement or by import_module("…")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which layer they reach"
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield ast.literal_eval(node.args[0])


def tree_of(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@cache
def imported(file: Path) -> frozenset[str]:
    return frozenset({name.split(".")[0] for name in modules_in(tree_of(file))})


def test_the_search_sees_every_way_to_import():
    """Late imports, `from`, dotted names and import_module are all found: else the tests below could not fail."""
    source = 'def f():\n from a.b import c\n import d.e\n import_module("g.h")\n importlib.import_module("i")\n'
    assert set(modules_in(ast.parse(source))) == {"a.b", "d.e", "g.h", "i"}
    assert len(FILES) > 30


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_only_go_down(file: Path):
    """schemas <- pipeline <- stages <- jobs: a module imports its own layer and those below, never one above."""
    above = set(LAYERS[LAYERS.index(file.parts[0]) + 1 :])
    assert not imported(file) & (above | {"tests"})


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "schemas"], ids=str)
def test_schemas_need_only_numpy_and_pyarrow(file: Path):
    assert imported(file) <= sys.stdlib_module_names | {"schemas", "numpy", "pyarrow"}


@pytest.mark.parametrize(
    ("library", "allowed"), [("ray", RAY), ("vllm", VLLM), ("torch", TORCH)], ids=["ray", "vllm", "torch"]
)
def test_a_heavy_library_has_few_doors(library: str, allowed: set[str]):
    found = {file.as_posix() for file in FILES if library in imported(file)}
    assert found <= allowed
    assert found, f"nobody imports {library}: this test looks for the wrong name"


def test_objectives_name_torch_only_for_the_type_checker():
    """A loss is a formula over tensors it is given: it can be registered where no torch is installed."""
    body = tree_of(Path("stages/training/objectives.py")).body
    guarded = [node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    assert any("torch" in modules_in(node) for node in guarded)
    assert not any("torch" in modules_in(node) for node in body if node not in guarded)


def test_no_module_is_named_utils():
    """A file is named for what it holds."""
    assert not [file for file in FILES if file.stem in ("utils", "util", "helpers", "common", "misc")]


def test_planning_imports_nothing_heavy(data_dir: Path):
    """A recipe is planned in a moment, on a machine that may have neither torch nor vLLM nor Ray."""
    code = f"""
import sys
import stages.all, jobs.recipes
from pathlib import Path
made = jobs.recipes.plans(["rso", "ipo"], [Path({str(data_dir / "demo.yaml")!r})], [])
assert all(step.key for plan in made for step in plan.steps)
print(sorted(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
