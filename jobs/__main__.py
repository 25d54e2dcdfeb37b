"""The command `winnow`."""

import jobs.commands.asking
import jobs.commands.bench
import jobs.commands.exporting
import jobs.commands.running  # noqa: F401
from jobs.commands.app import app, complaints
from schemas import WinnowError

INTERRUPTED = 130  # typer's exit code for ctrl-c


def main() -> None:
    """Errors that people can mend end with their message and exit code 2; never a traceback."""
    try:
        app()
    except WinnowError as error:
        for problem in error.problems:
            complaints.print(f"winnow: {problem}", style="red", highlight=False, markup=False)
        raise SystemExit(2) from None
    except OSError as error:
        complaints.print(f"winnow: {error}; finished parts are kept, the same command goes on from them", style="red")
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            complaints.print("winnow: interrupted; finished parts are kept, the same command goes on from them")
        raise


if __name__ == "__main__":
    main()
