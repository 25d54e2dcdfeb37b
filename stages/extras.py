"""Libraries that come with an extra of this package: how to install them where they are missing."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires

PACKAGE = "winnow-pipeline"


def install_command(extra: str, library: str) -> str:
    """Return the command that installs the libraries of an extra for this Python, under the names that indexes know.

    They are what this package requires for it, so that the command is the same from a wheel and from a checkout, in
    whichever folder. `library` alone where the package is not installed, but its files copied, as on a cluster.
    """
    try:
        lines = [line.partition(";") for line in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        lines = []
    names = [name.strip() for name, _, marker in lines if marker.replace("'", '"').strip() == f'extra == "{extra}"']
    return shlex.join([sys.executable, "-m", "pip", "install", *(names or [library])])
