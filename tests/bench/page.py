"""What the pages of benchmarks share: when, where and how they came about, figures with their spread, memory."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

MEASURED = "median over repeats [least, most]"


def facts(commit: str, libraries: Sequence[str]) -> dict[str, str]:
    """When, of which code, by which command, on which machine."""
    told = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    cpu = next(told, ": ?").split(":")[1].strip()
    return {
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit,
        "command": f"`{shlex.join(['python', '-m', 'tests.bench', *sys.argv[1:]])}`",
        "machine": f"{os.cpu_count()} cores, {_memory():.1f} GiB of memory, {cpu}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in libraries),
    }


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def load() -> str:
    """How many processes wanted a core in the last minute, on average."""
    return f"{os.getloadavg()[0]:.2f}"


def commit() -> str:
    """With a mark if the checkout is not what was committed."""
    here = Path(__file__).parent
    told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def written(title: str, told: dict[str, Any], how: str, tables: dict[str, pa.Table]) -> str:
    """A page in Markdown."""
    lines = "\n".join(f"* {name}: {value}" for name, value in told.items())
    body = "\n\n".join(f"## {name}\n\n{markdown(table)}" for name, table in tables.items())
    return f"# {title}\n\n{lines}\n\n{how}\n\n{body}\n"


def markdown(table: pa.Table) -> str:
    rows = [table.column_names, ["---"] * table.num_columns]
    rows += [["" if value is None else _cell(value) for value in row.values()] for row in table.to_pylist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """As MEASURED says."""
    return f"{np.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def resident(name: str) -> float:
    """Megabytes of this process now (VmRSS), or the most there ever was (VmHWM) since that was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6
