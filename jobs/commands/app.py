"""Consoles of `winnow`, and the parameters that several commands share."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.segment import Segments
from rich.tree import Tree
from typer.core import TyperCommand

from jobs.console import VisibleConsole
from pipeline.config.recipe import name_problems
from pipeline.plugins import running_only
from pipeline.store.storage import parse_location
from pipeline.store.store import Store
from schemas import COMMAND, WinnowError

# A Typer without commands: jobs/__main__.py adds them, in the order of use.
app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sample, rank, optimize: an offline pipeline from preferences to a better policy.",
)
console = VisibleConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
error_console = VisibleConsole(soft_wrap=True, stderr=True)
STORE = "store"


def print_tree(tree: Tree) -> None:
    """Print a tree with lines as long as they are: `console.print` would cut them at its width."""
    options = console.options.update(width=console.measure(tree, options=console.options.update(width=10**6)).maximum)
    lines = console.render_lines(tree, options, pad=False, new_lines=True)
    console.print(Segments(segment for line in lines for segment in line), soft_wrap=True, end="")


class Command(TyperCommand):
    """Command that refuses empty options: with `--run "$RUN"` of an unset variable, nobody meant the default."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # else the shell completes words that are not finished
            values, _, _ = self.make_parser(ctx).parse_args(list(args))  # as typed: a path of no characters is "."
            for param in self.params:
                value = values.get(param.name)
                if param.param_type_name == "option" and (value == "" or (isinstance(value, list) and "" in value)):
                    raise WinnowError(f"{max(param.opts, key=len)}: is empty; give a value, or omit it")
        return super().parse_args(ctx, args)


def _checked_store(url: str) -> str:
    """Return the URL or folder unchanged. Raise WinnowError, before a command reads anything, if it cannot be one."""
    parse_location(url)
    return url


def _run_only(ctx: typer.Context, files: list[Path]) -> list[Path]:
    """Let the command execute these files of Python, and no others that a config or recipe names."""
    if missing := [file for file in files if not file.expanduser().is_file()]:
        raise WinnowError(*(f"--plugin {file}: no such file in {Path.cwd()}" for file in missing))
    ctx.with_resource(running_only(files))
    return files


Recipes = Annotated[list[str], typer.Argument(help="recipe names, or YAML files")]
Configs = Annotated[list[Path], typer.Option("--config", help="YAML with your data and models, laid over the recipe")]
Sets = Annotated[list[str], typer.Option("--set", help="step.option=value")]
Plugins = Annotated[
    list[Path],
    typer.Option("--plugin", help="Python file with functions of yours; it alone may run", callback=_run_only),
]
Track = Annotated[list[str], typer.Option("--track", help="tracker of every training, such as tensorboard")]
Tags = Annotated[
    list[str], typer.Option("--tag", help="word, or KEY=VALUE, that the run is to be found by; no part of a key")
]
StorePath = Annotated[
    str,
    typer.Option("--store", help="where results are stored: a folder, or s3://bucket/folder", callback=_checked_store),
]
Over = Annotated[
    list[str],
    typer.Option("--over", help="step.option=value,value,...: a run for each value; of several, each combination"),
]


class ExecutorName(StrEnum):
    in_process = "in-process"
    ray = "ray"


Executor = Annotated[ExecutorName | None, typer.Option(help="this process, or Ray (which --address implies)")]
ClusterAddress = Annotated[
    str | None,
    typer.Option("--address", help="with Ray: a cluster that this machine is part of, or auto; by default a new one"),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Ray workers per step, unless the profile sets them (default: one per GPU; 2 without)", min=1),
]
ProfileName = Annotated[str | None, typer.Option("--profile", help="resources per stage: a profile's name, or a file")]
Name = Annotated[
    str | None,
    typer.Option("--name", help="the run's name; by default the recipe's, and in brackets what --set says"),
]
Only = Annotated[str | None, typer.Option(help="run this step alone; its inputs must be finished")]
Until = Annotated[str | None, typer.Option(help="run this step and what it needs")]
Onward = Annotated[str | None, typer.Option("--from", help="run this step and all that follow from it")]
Force = Annotated[str | None, typer.Option(help="run this step again, and all that follow from it")]
RunName = Annotated[str | None, typer.Option("--run", help="rows of this run alone, or of a round, as raft@2")]


def with_trackers(sets: list[str], track: list[str]) -> list[str]:
    """Return what --set and --track say together, as --set."""
    return [*sets, f"track=[{', '.join(track)}]"] if track else sets


def parsed_tags(words: list[str]) -> dict[str, str]:
    """Return --tag words as values by names; raise WinnowError for one without a name, or two values of one name."""
    tags: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name.strip():
            raise WinnowError(f"--tag {word}: has no name; write a word, or KEY=VALUE")
        if problems := name_problems(name):
            raise WinnowError(f"--tag {word!r}: its name {problems[0]}; give another")
        if tags.setdefault(name, value) != value:
            raise WinnowError(f"--tag {word}: {name} is {tags[name]!r} already; give one value")
    return tags


def existing_store(folder: str) -> Store:
    """Return a store to read. Raise WinnowError if the folder does not exist or holds no runs."""
    store = Store(folder)
    if isinstance(store.root, Path) and not store.root.is_dir():
        raise WinnowError(f"--store {folder}: no such folder in {store.root.parent}; `{COMMAND} run` creates it")
    if not store.runs():
        raise WinnowError(f"--store {folder}: no runs in this folder; `{COMMAND} run` creates them")
    return store
