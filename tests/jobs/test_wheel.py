"""A wheel in an environment of its own: the command works, and all that it reads beside code is in the wheel."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import ROOT

PACKAGES = ("schemas", "pipeline", "stages", "jobs")
Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and the libraries of this one; the checkout is not on its path."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:  # a copy: setuptools leaves its own folder beside what it builds
        shutil.copytree(ROOT / package, folder / "source" / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "source" / "pyproject.toml")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
    options = ["--no-deps", "--no-index"]
    build: list[str | Path] = [
        *pip,
        "wheel",
        *options,
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        folder / "source",
    ]
    subprocess.run(build, check=True, timeout=120)
    shutil.rmtree(folder / "source")
    (wheel,) = folder.glob("*.whl")

    venv.create(folder / "env", symlinks=True)
    (site,) = (folder / "env").glob("lib/*/site-packages")
    # A path in a .pth file is not searched for .pth files, of which one would be the editable install of this checkout.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    install: list[str | Path] = [
        *pip[:3],
        "--python",
        folder / "env" / "bin" / "python",
        *pip[3:],
        "install",
        *options,
        wheel,
    ]
    subprocess.run(install, check=True, timeout=120)
    return folder / "env"


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> Command:
    """Run `winnow` of that environment in an empty folder; return the finished process."""

    def run(*words: str | Path) -> subprocess.CompletedProcess:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [environment / "bin" / "winnow", *words]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def test_the_wheel_has_every_file_of_the_packages(environment: Path):
    (site,) = environment.glob("lib/*/site-packages")
    files = [file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file()]
    expected = [file for file in files if "__pycache__" not in file.parts and file.suffix != ".md"]  # its pages
    assert [file for file in expected if not (site / file).is_file()] == []


def test_the_page_on_installing_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "jobs" / "README.md").read_text()
    assert [extra for extra in extras if f"| `{extra}` |" not in page] == []


def test_the_command_lists_recipes_and_describes_stages(installed: Command):
    assert installed("--version").stdout.startswith("winnow 0.")
    assert "arXiv 2309.06657" in installed("recipes").stdout
    assert "rejection_sample" in installed("options", "select").stdout


def test_a_recipe_with_a_config_and_a_plugin_of_the_user_is_planned(installed: Command, data_dir: Path, tmp_path: Path):
    (tmp_path / "rewards.py").write_text(
        "from stages.ranking.rankers import verifiable\n\n\n"
        "@verifiable\ndef short(prompt: str, response: str, *, words: int = 9) -> float:\n    return words\n"
    )
    (tmp_path / "my.yaml").write_text("plugins: [./rewards.py]\nranker: {use: short, with: {words: 3}}\n")
    shown = installed(
        "plan", "rso", "--config", data_dir / "demo.yaml", "--config", "my.yaml", "--plugin", "rewards.py", "--options"
    ).stdout
    assert "by.words: 3 (" in shown


@pytest.mark.bench
def test_queries_and_the_page_are_there(installed: Command, finished: Path, tmp_path: Path):
    assert "gold_win" in installed("sql", "leaderboard", "--store", finished).stdout
    installed("report", "--store", finished, "--out", "page.html")
    assert "<html" in (tmp_path / "page.html").read_text()


@pytest.mark.bench
def test_the_demo_starts(environment: Path, tmp_path: Path):
    """Until its first model is there."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(environment / "bin" / "winnow"), "demo"]
    demo = subprocess.Popen(
        command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if "finished" in line:
            break
    demo.send_signal(signal.SIGTERM)
    demo.communicate(timeout=60)
    assert any(line.split()[:2] == ["base", "finished"] for line in lines), "".join(lines)
    assert (tmp_path / "demo" / "demo.yaml").is_file()
