"""What the JSON files of a store must say before any other code believes them."""

import json
import re
from typing import Any

from schemas import WinnowError

Json = dict[str, Any]
PLAIN = re.compile(r"\w[\w.-]*", re.ASCII)


def stage_versions(manifests: list[Json]) -> set[tuple[str, Any]]:
    return {(manifest["stage"], manifest["identity"].get("version")) for manifest in manifests}


def manifest_summary(manifest: Json) -> Json:
    rows, counters = manifest["rows"], manifest["counters"]
    return {
        "stage": manifest["stage"],
        "key": manifest["key"],
        "options": json.dumps(manifest["identity"]["options"], sort_keys=True),
        "inputs": json.dumps(manifest["identity"]["inputs"], sort_keys=True),
        "rows": sum(count for name, count in rows.items() if name != "rejects"),
        "rejects": rows.get("rejects", 0),
        "bytes": sum(manifest["bytes"].values()),
        "seconds": float(manifest["seconds"]),
        "wall_seconds": float(manifest["wall_seconds"]),
        "tokens": counters.get("tokens", 0),
        "ranker_calls": counters.get("ranker_calls", 0),
        "gpu_seconds": manifest.get("gpu_seconds"),
        "cpu_seconds": manifest.get("cpu_seconds"),
        "made": str(manifest["made"]),
        "commit": str(manifest["commit"]),
        "model": manifest.get("model"),
    }


def checked_manifest(manifest: Json) -> Json:
    """Raises WinnowError where it lists a file outside its own folder, lies in another's, or is none of ours."""
    place = f"{manifest['folder']}/manifest.json"
    try:
        manifest_summary(manifest)
        stage_versions([manifest])  # which a set must be able to hold
        home = [manifest["stage"], manifest["key"]]
        strange = [file["file"] for file in manifest["files"] if not PLAIN.fullmatch(file["file"])]
        [file["rows"] for file in manifest["files"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WinnowError(f"{place}: no manifest of ours ({error!r}); delete its folder and run again") from None
    if strange:
        raise WinnowError(f"{place}: {strange[0]!r} is no name of a part; delete its folder and run again")
    if home != manifest["folder"].rstrip("/").split("/")[-2:] or not all(map(PLAIN.fullmatch, home)):
        said = "/".join(map(str, home))
        raise WinnowError(f"{place}: it says that it is {said}; move its folder there, or delete it")
    return manifest


def checked_run(name: str, steps: Any) -> dict[str, Json]:
    """Step name -> stage and key, and nothing else; raises WinnowError where a run's file says something else."""
    try:
        return {step: {"stage": str(link["stage"]), "key": str(link["key"])} for step, link in steps.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise WinnowError(f"run {name!r}: its file in runs/ is none of ours ({error!r}); delete it") from None
