"""Advice to users whose run has ended early: the command that continues it, where that can help."""

import os
import shlex
import sys

from pipeline.execution.retries import may_pass
from schemas import COMMAND

SUBMITTED = "WINNOW_SUBMITTED"  # environment variable of a job: the command that submitted it
started = False  # whether a run has started and has not ended: what it has finished is kept


def advice(error: BaseException | None = None) -> list[str]:
    """Return what is kept of the run, if one has started, and the command that continues it.

    None stands for a signal. After an error that the same command would meet again, no command is printed.
    """
    if not started:
        return []
    if error is None or may_pass(error):
        return ["finished parts are kept", f"resume with: {command(sys.argv)}"]
    forced = any(word.partition("=")[0] == "--force" for word in sys.argv)
    forget = "; --force has deleted what it names: omit it from now on" if forced else ""
    return [f"the same command would end in the same way; finished parts are kept{forget}"]


def command(words: list[str]) -> str:
    """Return the command line quoted for a shell, without --force; in a job, the command that submitted it.

    A job's own command line names copies that are deleted with it. `python -m jobs` stays as it was called.
    """
    if submitted := os.environ.get(SUBMITTED):
        return submitted
    program, *rest = words
    return shlex.join([*_program(program), *without_force(rest)])


def recorded_command() -> list[str]:
    """Return the words that this process was called with, for the store; none in a job, whose files are copies."""
    return [] if os.environ.get(SUBMITTED) else without_force(sys.argv[1:])


def hint(*words: str) -> str:
    """Return a command of ours that can be pasted: with the program as this process was called, quoted for a shell."""
    program = sys.argv[0]
    return shlex.join([*(_program(program) if program.endswith(("winnow", "jobs/__main__.py")) else [COMMAND]), *words])


def _program(program: str) -> list[str]:
    python = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    return python if program.endswith("__main__.py") else [program]


def without_force(words: list[str]) -> list[str]:
    """Return the words without --force: it deleted results when the run began, and would now undo the run's own."""
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before != "--force" and word != "--force" and not word.startswith("--force=")
    ]
