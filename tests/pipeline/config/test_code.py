"""Digests of code: what counts as a change of a function, and how far its calls are followed."""

import linecache
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, invalidate_caches
from pathlib import Path

import pytest

from pipeline.config import code
from pipeline.config.code import code_digests

FILES = {
    "__init__": "from late_package.names import shared\n",
    "names": "def shared(x):\n    return x\n",
    "rules": """
import functools
from late_package import maths

LIMIT = 3
OTHER = 4
WORDS = {"short": len}


class Sized:
    def size(self):
        return LIMIT


def helper(x, scale=2):
    return Sized().size() * helper(x - 1) if x else scale


def rule(x):
    from . import shared
    from late_package.late import slow

    return helper(maths.double(x)), slow(x), shared(x), WORDS["short"]("x")


def unused():
    return OTHER
""",
    "maths": "def double(x):\n    return 2 * x\n\n\ndef triple(x):\n    return 3 * x\n",
    "late": "import no_library\nfrom late_package.maths import triple as times\n\ndef slow(x):\n    return times(x)\n",
}
USES = ["rules.helper", "rules.LIMIT", "rules.Sized", "rules.WORDS", "maths.double", "maths.triple", "late.slow"]
USES = [f"late_package.{name}" for name in (*USES, "names.shared")]


@pytest.fixture
def digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Return the digests of `rule` in a package of which one file has another text."""
    folder = tmp_path / "late_package"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    def digests(file: str = "rules", old: str = "", new: str = "") -> dict[str, str]:
        for name, text in FILES.items():
            assert old in text or name != file
            (folder / f"{name}.py").write_text(text.replace(old, new) if name == file and old else text)
        for name in [name for name in sys.modules if name.startswith("late_package")]:
            monkeypatch.delitem(sys.modules, name)
        for cached in (code._source_module, code._find, code._digest, code_digests):
            cached.cache_clear()
        linecache.clearcache()
        invalidate_caches()
        return code_digests(import_module("late_package.rules").rule)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files of one size and second would be taken for the same
    return digests


def test_all_that_a_function_uses_is_followed_and_nothing_is_imported_for_it(digests: Callable[..., dict[str, str]]):
    """Through its module, other modules, late imports, re-exports, classes, constants and dicts; each once."""
    for _ in range(2):
        assert list(digests()) == ["rule", *sorted(USES)]
    rules = sys.modules["late_package.rules"]
    helper = code_digests(rules.helper)
    assert list(helper) == ["helper", "late_package.rules.LIMIT", "late_package.rules.Sized"]
    assert code_digests(rules.rule)["late_package.rules.helper"] == helper["helper"]
    assert code_digests(lambda: None) == {}
    assert "late_package.late" not in sys.modules


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (("rules", "return helper", "return -1, helper"), ["rule"]),
        (("rules", "if x else", "if x > 1 else"), ["rules.helper"]),
        (("rules", "scale=2", "scale=3"), ["rules.helper"]),
        (("rules", "LIMIT = 3", "LIMIT = 5"), ["rules.LIMIT"]),
        (("rules", "return LIMIT", "return -LIMIT"), ["rules.Sized"]),
        (("rules", '"short": len', '"short": max'), ["rules.WORDS"]),
        (("maths", "2 * x", "x + x"), ["maths.double"]),
        (("maths", "3 * x", "4 * x"), ["maths.triple"]),
        (("late", "return times", "return -times"), ["late.slow"]),
        (("names", "return x", "return -x"), ["names.shared"]),
        (("rules", "return OTHER", "return -OTHER"), []),
        (("rules", "def helper", "# why\n@functools.cache\ndef helper"), []),
        (("rules", "    return Sized", '    "Help."\n\n    return  Sized'), []),
        (
            ("rules", "    def size(self):", '    """Has a size."""\n\n    def size(self):\n        "Size."  # of it'),
            [],
        ),
    ],
    ids=str,
)
def test_a_change_is_found_where_it_is_and_comments_and_docstrings_are_none(
    digests: Callable[..., dict[str, str]], change: tuple[str, str, str], changed: list[str]
):
    before, after = digests(), digests(*change)
    expected = [name if name == "rule" else f"late_package.{name}" for name in changed]
    assert [name for name in before if before[name] != after.get(name)] == expected
    assert after.keys() == before.keys()


def test_digests_are_the_same_in_every_process_and_planning_imports_no_torch():
    """Also of a stage whose network is imported when it runs, and after torch has been imported."""
    script = (
        "import sys, stages.all; from pipeline.config.code import code_digests; from pipeline.stage import stages as s;"
        "print(code_digests(s.find('optimize').fn), code_digests(s.find('select').fn), 'torch' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", f"{first}{script}"], capture_output=True, text=True, check=True).stdout
        for first in ("", "import stages.network.forward;")
    ]
    plain, imported = (run.rsplit(maxsplit=1) for run in runs)
    assert plain[0] == imported[0]
    assert (plain[1], imported[1]) == ("False", "True")
    assert "stages.network.forward.completion_logp" in plain[0]
    assert "schemas.ids.seed_for" in plain[0]
