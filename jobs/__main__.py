"""The command `winnow`."""

import warnings
from typing import TextIO

import jobs.commands.artifacts
import jobs.commands.cluster
import jobs.commands.export
import jobs.commands.query
import jobs.commands.run  # noqa: F401
from jobs.commands.app import app, complaints
from jobs.resume import advice
from schemas import WinnowError, WinnowWarning

INTERRUPTED = 130  # typer's exit code for ctrl-c
AGAIN = "the same command goes on from them"
_python = warnings.showwarning


def main() -> None:
    """Errors that people can mend end with their message and exit code 2; never a traceback."""
    warnings.showwarning = _warn
    try:
        app()
    except WinnowError as error:
        _complain(*error.problems, *advice(error))
        raise SystemExit(2) from None
    except OSError as error:
        again = advice(error)  # of a run; other commands make nothing that could be kept
        _complain(f"{error}; finished parts are kept" if again else str(error), *again)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _complain("interrupted; finished parts are kept", *(advice(end) or [AGAIN]), style="")
        raise


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours without a file and a line of Python, which are nothing to those who read it."""
    if issubclass(category, WinnowWarning):
        _complain(str(message), style="yellow")
    else:
        _python(message, category, filename, lineno, file, line)


def _complain(*problems: str, style: str = "red") -> None:
    for problem in problems:
        complaints.print(f"winnow: {problem}", style=style, highlight=False, markup=False)


if __name__ == "__main__":
    main()
