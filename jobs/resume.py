"""The command line that goes on where a run failed: the same one, without what has happened already."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

RESUME = "resume with: "
SUBMITTED = "WINNOW_SUBMITTED"  # in a job: the command that submitted it


@contextmanager
def resumable() -> Iterator[None]:
    """Whatever ends the run early says how to go on, in a note that main() prints, or Python below its traceback."""
    try:
        yield
    except BaseException as error:
        error.add_note(RESUME + command(sys.argv))
        raise


def command(words: list[str]) -> str:
    """Quoted for a shell, and forcing no more."""
    if told := os.environ.get(SUBMITTED):
        return told  # a job's own command line is of copies that are gone with it
    me, *rest = words
    return shlex.join([*_called(me), *unforced(rest)])


def unforced(words: list[str]) -> list[str]:
    """Without --force: what it dropped is gone once the run began, so to force again would undo the run's work."""
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before != "--force" and word != "--force" and not word.startswith("--force=")
    ]


def _called(me: str) -> list[str]:
    """`winnow` as it was called, or `python -m jobs`."""
    if not me.endswith("__main__.py"):
        return [me]
    return sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]


def advice(error: BaseException | None) -> list[str]:
    """How to go on, of an error or of what it came from: Ctrl-C reaches main() as an exit that followed from it."""
    while error is not None:
        if notes := [note for note in getattr(error, "__notes__", []) if note.startswith(RESUME)]:
            return notes
        error = error.__context__
    return []
