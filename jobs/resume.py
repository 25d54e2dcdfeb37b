"""Command line that continues a run that failed: the same one, without what has happened already."""

import os
import shlex
import sys

SUBMITTED = "WINNOW_SUBMITTED"  # environment variable of a job: the command that submitted it
started = False  # whether a run has started and has not ended: what it has finished is kept


def resume_note() -> list[str]:
    """Return a line with the command that continues the run, if one has started."""
    return [f"resume with: {command(sys.argv)}"] if started else []


def command(words: list[str]) -> str:
    """Return the command line quoted for a shell, without --force; in a job, the command that submitted it.

    A job's own command line names copies that are deleted with it. `python -m jobs` stays as it was called.
    """
    if submitted := os.environ.get(SUBMITTED):
        return submitted
    program, *rest = words
    python = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    return shlex.join([*(python if program.endswith("__main__.py") else [program]), *without_force(rest)])


def without_force(words: list[str]) -> list[str]:
    """Return the words without --force: it deleted results when the run began, and would now undo the run's own."""
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before != "--force" and word != "--force" and not word.startswith("--force=")
    ]
