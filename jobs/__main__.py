"""Entry point of the command `winnow`: registers the commands, and prints errors without a traceback."""

import atexit
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, TextIO

import typer

from jobs import resume
from jobs.commands.app import Command, app, error_console
from jobs.commands.artifacts import adopt, gc, ls, model, why
from jobs.commands.cluster import logs, stop, submit
from jobs.commands.diagnose import diagnose
from jobs.commands.evidence import evidence
from jobs.commands.inspect import inspect
from jobs.commands.query import export, leaderboard, options, recipes, report, sql, status, trace
from jobs.commands.run import demo, paper, plan, run, sweep
from jobs.commands.verify import verify
from pipeline.execution.retries import describe_os_error, may_pass
from pipeline.execution.run import commit
from schemas import COMMAND, WinnowError, WinnowWarning

# Groups and commands as `--help` lists them: in the order of use.
GROUPS = {
    "Run": (demo, inspect, plan, run, sweep, diagnose),
    "Ask": (leaderboard, status, sql, trace, report, ls, why),
    "Data": (model, export, adopt, gc, verify),
    "Cluster": (submit, logs, stop),
    "Reference": (recipes, options, paper, evidence),
}
for group, commands in GROUPS.items():
    for command in commands:
        app.command(cls=Command, rich_help_panel=group)(command)

SIGNALS = {130: "interrupted", 143: "terminated"}  # by exit code: 128 and the signal, as shells have it
_show_python_warning = warnings.showwarning
_shown: set[str] = set()  # texts of warnings that this command has printed


def _print_version(show: bool) -> None:
    if show:
        try:
            number = version("winnow-pipeline")
        except PackageNotFoundError:  # a copy of the packages, as on a cluster
            number = "(not installed)"
        typer.echo(f"{COMMAND} {number}, commit {commit() or 'unknown'}")
        raise typer.Exit


@app.callback()
def winnow(
    show_version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Print the version, or run a command."""


def main() -> None:
    """Run the command line; an error that users can correct ends it with exit code 2 and no traceback."""
    warnings.showwarning = _show_warning
    _shown.clear()
    resume.started = False
    exit_codes: list[int] = []
    atexit.register(_exit_by_signal, exit_codes)  # the first one registered is the last one called
    try:
        app()
    except WinnowError as error:
        _print_problems(*error.problems, *resume.advice(error))
        raise SystemExit(2) from None
    except OSError as error:
        _print_problems(describe_os_error(error), *resume.advice(error))
        raise SystemExit(2) from None
    except SystemExit as error:
        if error.code in SIGNALS:
            _print_problems(SIGNALS[error.code], *resume.advice(), style="")
            exit_codes.append(error.code)
        raise
    except BaseException as error:
        if may_pass(error):  # Ray's, of a machine that has failed: its traceback says nothing of that
            _print_problems(f"{type(error).__name__}: {error}", *resume.advice(error))
            raise SystemExit(2) from None
        for line in resume.advice(error):
            error.add_note(line)  # Python prints it below the traceback
        raise


def _exit_by_signal(exit_codes: list[int]) -> None:
    """End with the exit code of a signal: Python itself ends by SIGINT if the interrupt fell into code that C ran."""
    if exit_codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_codes[0])


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our warnings once per command, without file and line of Python, which mean nothing to users.

    What a plan has said of a file's first rows, with their number, is not said again when the step reads them all.
    """
    if issubclass(category, WinnowWarning):
        if not any(text.endswith(str(message)) for text in _shown):
            _print_problems(str(message), style="yellow")
        _shown.add(str(message))
    else:
        _show_python_warning(message, category, filename, lineno, file, line)


def _print_problems(*problems: str, style: str = "red") -> None:
    for problem in problems:
        error_console.print(f"{COMMAND}: {problem}", style=style, highlight=False, markup=False)


if __name__ == "__main__":
    main()
