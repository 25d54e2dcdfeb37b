"""Pages of benchmarks in Markdown: date, code, command and machine, and figures with their spread."""

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
    """Return date, commit, command, machine and library versions."""
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in cpu_info if line.startswith("model name")), ": ?")
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit,
        "command": f"`{shlex.join(['python', '-m', 'tests.bench', *sys.argv[1:]])}`",
        "machine": f"{os.cpu_count()} cores, {gibibytes:.1f} GiB of memory, {model.split(':')[1].strip()}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in libraries),
    }


def load() -> str:
    """Return the load average of the last minute: the mean number of processes that could use a core."""
    return f"{os.getloadavg()[0]:.2f}"


def commit() -> str:
    """Return the checkout's commit, with -dirty if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    output = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    return output.strip() or "unknown"


def written(title: str, facts: dict[str, Any], method: str, tables: dict[str, pa.Table]) -> str:
    """Return a page in Markdown: title, facts, how it was measured, and the tables by title."""
    sections = [f"# {title}", "\n".join(f"* {name}: {value}" for name, value in facts.items()), method]
    for name, table in tables.items():
        lines = [table.column_names, ["---"] * table.num_columns]
        for row in table.to_pylist():
            cells = ("" if value is None else str(value) for value in row.values())
            lines.append([cell.replace("|", "\\|").replace("\n", " ") for cell in cells])
        sections += [f"## {name}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(sections) + "\n"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return "median [least, most]", as MEASURED says."""
    return f"{np.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def resident(name: str) -> float:
    """Return this process's resident memory in megabytes: VmRSS is that of now, VmHWM the maximum since its reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6
