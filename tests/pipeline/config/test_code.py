"""Digests of code: what counts as a change of a function, and how far its calls are followed."""

import linecache
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, invalidate_caches
from pathlib import Path

import pytest
import torch  # noqa: F401 - one process of two has it

from pipeline.config import code
from pipeline.config.code import code_digests
from pipeline.config.plan import Step, stale_code
from pipeline.registry import Entry
from pipeline.stage import stages

FILES = {
    "__init__": "from late_package.names import shared\n",
    "names": "def shared(x):\n    return x\n",
    "rules": """
import functools
from late_package import maths

def registry(**metadata):
    return lambda fn: fn


LIMIT = 3
OTHER = 4
WORDS = {"short": len}


class Sized:
    def size(self):
        return LIMIT


@registry(lines=3, version=1)
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
USES = [
    "rules.registry",
    "rules.helper",
    "rules.LIMIT",
    "rules.Sized",
    "rules.WORDS",
    "maths.double",
    "maths.triple",
    "late.slow",
]
USES = [f"late_package.{name}" for name in (*USES, "names.shared")]


@pytest.fixture
def digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Return the digests of `rule` in a package of which one file has another text."""
    monkeypatch.syspath_prepend(tmp_path)

    def digests(file: str = "rules", old: str = "", new: str = "", files: dict[str, str] = FILES) -> dict[str, str]:
        folder = tmp_path / "late_package"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in files.items():
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
    assert list(helper) == ["helper", *(f"late_package.rules.{name}" for name in ("LIMIT", "Sized", "registry"))]
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
        (("rules", "def helper", "# why\n@functools.cache\ndef helper"), ["rules.helper"]),
        (("rules", "(lines=3, version=1)", "(lines=4, version=1)"), ["rules.helper"]),
        (("rules", "(lines=3, version=1)", "(lines=3, version=2, aliases=('h',))"), []),
        (("rules", "LIMIT = 3", "LIMIT = 3\nLIMIT *= 0.5"), ["rules.LIMIT"]),
        (("rules", "LIMIT = 3", "LIMIT = 3\nfor LIMIT in (4, 5):\n    pass"), ["rules.LIMIT"]),
        (("rules", "LIMIT = 3", "LIMIT = 3\nif len('a'):\n    LIMIT = 4"), ["rules.LIMIT"]),
        (("rules", '{"short": len}', '{"short": len}\nWORDS["short"] = max'), ["rules.WORDS"]),
        (("rules", '{"short": len}', '{"short": len}\nWORDS.update(short=max)'), ["rules.WORDS"]),
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


RULE = """
import math as m
from late_package import second
from late_package.first import f

def rule(x):
    from late_package.first import divide as scale

    return f(x), second.f(x), scale(x), scale(m.sqrt(x))
"""
SHARED = {
    "__init__": "",
    "first": "def f(x):\n    return x\n\n\ndef divide(x):\n    return x / 2\n\n\ndef unused(): ...\n",
    "second": "def f(x):\n    return -x\n",
    "rules": RULE,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("import math as m", "import cmath as m")], ["`rule` has changed"]),
        ([("import divide as scale", "import f as scale")], ["`rule` has changed"]),  # another one that was used before
        ([("first import f", "second import f")], ["`rule` uses has changed", "late_package.first.f"]),  # of one name
        ([("import divide as scale", "import divide"), ("scale(", "divide(")], []),
        ([("import math as m", "import math"), ("m.sqrt", "math.sqrt")], []),
        (
            [
                ("import math as m\n", ""),
                ("m.sqrt", "sqrt"),
                ("\n\n    return", "\n    from math import sqrt\n    return"),
            ],
            [],
        ),
        ([("late_package.first", "late_package.moved")], []),
    ],
    ids=str,
)
def test_a_name_counts_as_what_it_refers_to(
    digests: Callable[..., dict[str, str]], changes: list[tuple[str, str]], words: list[str]
):
    """Not as how it was imported, nor by the module that it is in: a definition that only moved is no change."""
    before = digests(files=SHARED)
    text = RULE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    digests(files=SHARED | {"moved": SHARED["first"], "rules": text})
    rule = sys.modules["late_package.rules"].rule
    lines = stale_code(Step("step", Entry("rule", rule), {}, {}, 1), {"code": before})
    assert len(lines) == bool(words)
    assert [word for word in words if word not in lines[0]] == []


def test_digests_are_the_same_in_every_process_and_planning_imports_no_torch():
    """Also of a stage whose network is imported when it runs, and after torch has been imported."""
    script = (
        "import sys, stages.all; from pipeline.config.code import code_digests; from pipeline.stage import stages as s;"
        "print(code_digests(s.find('optimize').fn), code_digests(s.find('select').fn), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    digests, has_torch = done.stdout.rsplit(maxsplit=1)
    assert has_torch == "False"
    assert "torch" in sys.modules
    here = [code_digests(stages.find(name).fn) for name in ("optimize", "select")]
    assert digests == " ".join(map(str, here))
    assert "stages.network.forward.completion_logp" in digests
    assert "schemas.ids.seeds_for" in digests
