"""Command line that continues a run that failed: the same one, without what has happened already."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

RESUME = "resume with: "
SUBMITTED = "WINNOW_SUBMITTED"  # environment variable of a job: the command that submitted it


@contextmanager
def resumable() -> Iterator[None]:
    """Add a note with the command that continues to whatever ends the run early.

    main() prints the note, and Python prints it below a traceback.
    """
    try:
        yield
    except BaseException as error:
        error.add_note(RESUME + command(sys.argv))
        raise


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


def resume_notes(error: BaseException | None) -> list[str]:
    """Return the notes of an error, or of its context: Ctrl-C reaches main() as an exit that followed from it."""
    while error is not None:
        if notes := [note for note in getattr(error, "__notes__", []) if note.startswith(RESUME)]:
            return notes
        error = error.__context__
    return []
