"""Rows about steps that are not finished, read anew by each statement that names their tables."""

import json
import time
from datetime import datetime

import pyarrow as pa

from pipeline.sql.views import METRICS_NOW, RUNNING
from pipeline.store.storage import Location, read_all
from pipeline.store.store import METRICS_NOW as METRICS_FILE
from pipeline.store.store import PROGRESS, Json, StepFolder

SILENT_SECONDS = 3600.0  # after which a step in a store without locks does not count as running


def running_rows(root: Location, keys: set[str] | None) -> pa.Table:
    """Return the rows of `running`, of all steps or of those with these keys."""
    rows = []
    for path, content in read_all(root, f"*/*/{PROGRESS}").items():
        stage, key = path.parent.parent.name, path.parent.name
        record = _complete_object(content.decode())
        if record is None or (keys is not None and key not in keys):
            continue
        # A process that was killed has left this file, and no lock.
        runs = StepFolder(path.parent).is_locked()
        if runs is None:
            runs = time.time() - datetime.fromisoformat(record["updated"]).timestamp() < SILENT_SECONDS
        if not runs:
            continue
        rows.append({"stage": stage, "key": key, **record})
    return pa.Table.from_pylist(rows, schema=RUNNING)


def metrics_now_rows(root: Location, keys: set[str] | None) -> pa.Table:
    """Return the rows of `metrics_now`, of all steps or of those with these keys."""
    rows = []
    for path, content in read_all(root, f"*/*/{METRICS_FILE}").items():
        stage, key = path.parent.parent.name, path.parent.name
        if (keys is not None and key not in keys) or (path.parent / "manifest.json").exists():
            continue
        for line in content.decode().splitlines():
            entry = _complete_object(line)
            for name, value in (entry or {}).items():
                if entry and name != "step":
                    metric = name.removeprefix("speed/")
                    rows.append(
                        {"step": int(entry["step"]), "metric": metric, "value": value, "stage": stage, "key": key}
                    )
    return pa.Table.from_pylist(rows, schema=METRICS_NOW)


def _complete_object(text: str) -> Json | None:
    """Return a JSON object, or None for a line that is being written."""
    try:
        decoded: Json = json.loads(text)
    except ValueError:
        return None
    return decoded
