"""Validation of the JSON files of a store before any other code relies on them.

A store may have been copied, edited or written by somebody else, and SQL is built from what it says: names are checked
here, so that no statement and no path is ever made of an unchecked one.
"""

import json
import re
from hashlib import sha256
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, RootModel, StringConstraints

from pipeline.registry import validated
from schemas import COMMAND, WinnowError

# Of manifests and sidecars; one with a larger number was written by a later version of this code. Since 2 they end with
# the digest of their content, and since 3 tables without rows have no file.
FORMAT, FIRST_WITH_DIGEST = 3, 2
DIGEST = "sha256"
# Of the object itself, whose fields are indented by one space: those of files in it have more.
DIGEST_LINE = re.compile(rb'\n "sha256": "[0-9a-f]{64}"(,?)(?=\n)')  # it begins with a text, which is found fast
VERIFY_HINT = f"`{COMMAND} verify --repair` sets it aside and makes it again"

KEY = re.compile(r"[0-9a-f]{16}")
PlainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # no separator, glob or quote


class DamagedError(WinnowError):
    """File of a store that is not as it was written: it counts as if it were not there."""


class StrictModel(BaseModel):
    """Base of the models below: no conversions; fields that a model does not name are kept and not checked."""

    model_config = ConfigDict(strict=True)


class ListedFile(StrictModel):
    """Part of a table, as a manifest lists it."""

    file: PlainName
    rows: int
    bytes: int


class Identity(StrictModel):
    """Content of a key: the stage's version and options, and the key behind each of its inputs."""

    version: int | None = None
    options: dict[str, Any]
    inputs: dict[str, str]


class Manifest(StrictModel):
    """Record of a finished step."""

    stage: PlainName
    key: PlainName
    identity: Identity
    files: list[ListedFile]
    rows: dict[str, int]
    bytes: dict[str, int]
    counters: dict[str, float]
    measures: dict[str, dict[str, float]] = {}  # by name: total, count and largest; the mean is total / count
    parts: int = 0  # into which its tables are divided
    seconds: float
    wall_seconds: float
    gpu_seconds: float | None = None
    cpu_seconds: float | None = None
    made: str
    commit: str | None
    model: str | None = None


class PartSidecar(StrictModel):
    """Record of a finished part: its files, and the names of its tables without rows, which have none."""

    files: list[ListedFile]
    empty: list[PlainName] = []


class WholeSidecar(StrictModel):
    """Record of all parts, by one call."""

    parts: list[PartSidecar]


class StepLink(StrictModel):
    """Where a step of a run is stored: `<store>/<stage>/<key>/`."""

    stage: str
    key: str


class RunLinks(RootModel[dict[str, StepLink]]):
    """Steps of a run by name."""


def encode_sealed(content: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest or sidecar, with its format and the digest of the rest as its last fields."""
    plain = {name: value for name, value in content.items() if name != DIGEST} | {"format": FORMAT}
    return _encoded(plain | {DIGEST: sha256(_encoded(plain)).hexdigest()})


def decode_sealed(path: Any, content: bytes) -> dict[str, Any]:
    """Return what a manifest or sidecar holds besides its digest.

    Raises DamagedError if a byte of it is not as it was written, and WinnowError if a later version wrote it. Those of
    format 1 have no digest.
    """
    decoded = checked_format(path, decode(path, content))
    digest = decoded.pop(DIGEST, None)
    if digest is None and decoded.get("format", 1) < FIRST_WITH_DIGEST:
        return decoded
    lines = list(DIGEST_LINE.finditer(content))
    if len(lines) == 1:
        # What the digest is of: these bytes without its line. To encode the object again takes 50 times as long.
        (line,) = lines
        # The comma before the line stays, but for the last field's.
        before = content[: line.start()] if line[1] else content[: line.start()].removesuffix(b",")
        if sha256(before + content[line.end() :]).hexdigest() == digest:
            return decoded
    raise DamagedError(f"{path}: is damaged (its content has another digest than it says); {VERIFY_HINT}")


def decode(path: Any, content: bytes) -> dict[str, Any]:
    """Return the object in a JSON file; raise DamagedError if there is none."""
    try:
        decoded = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: cannot be read ({error}); {VERIFY_HINT}") from None
    if not isinstance(decoded, dict):
        raise DamagedError(f"{path}: cannot be read (it is not a JSON object); {VERIFY_HINT}")
    return decoded


def _encoded(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def checked_format(path: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest that was read from `path`; raise WinnowError if a later version of this code wrote it."""
    number = manifest.get("format", 1)
    if not isinstance(number, int):
        raise DamagedError(f"{path}: is damaged (its format is no number); {VERIFY_HINT}")
    if number > FORMAT:
        raise WinnowError(
            f"{path}: has format {manifest['format']}, and this version of Winnow reads up to {FORMAT}; update Winnow "
            "to the version that wrote it"
        )
    return manifest


def checked_sidecar(path: Any, sidecar: dict[str, Any]) -> dict[str, Any]:
    """Return a sidecar as it is; raise DamagedError if it lists no files, or one outside its own folder."""
    try:
        validated(WholeSidecar if "parts" in sidecar else PartSidecar, sidecar)
    except WinnowError as error:
        raise DamagedError(f"{path}: not a valid sidecar ({error.problems[0]:.200}); {VERIFY_HINT}") from None
    return sidecar


def checked_manifest(manifest: dict[str, Any], in_place: bool = True) -> dict[str, Any]:
    """Return a manifest as it is; its item `folder` says where it was read from.

    in_place: that folder is one of a store. Of another, which may be a copy, the name alone is compared if it is a key.

    Raises DamagedError if a field is missing or has another type, if it lists a file outside its own folder, or if it
    lies in the folder of another step.
    """
    folder = manifest["folder"]
    path = f"{folder}/manifest.json"
    checked_format(path, manifest)
    try:
        validated(Manifest, manifest)
    except WinnowError as error:
        reason = f"{error.problems[0]:.200}"
        raise DamagedError(f"{path}: not a valid manifest ({reason}); {VERIFY_HINT}") from None
    stage, key = ["", "", *folder.rstrip("/").split("/")][-2:]
    belongs = manifest["key"] == key and manifest["stage"] == stage
    if not (belongs if in_place else manifest["key"] == key or not KEY.fullmatch(key)):
        raise DamagedError(
            f"{path}: it belongs to {manifest['stage']}/{manifest['key']}; move its folder there, or {VERIFY_HINT}"
        )
    return manifest


def checked_run(name: str, steps: Any) -> dict[str, dict[str, str]]:
    """Return step name -> stage and key, without other fields; raise WinnowError if a run's file is not of that form.

    These names are data and not paths: any string is accepted, and SQL gets them as values.
    """
    try:
        return validated(RunLinks, steps).model_dump()
    except WinnowError as error:
        reason = f"{error.problems[0]:.200}"
        raise DamagedError(f"run {name!r}: its file in runs/ is not valid ({reason}); {VERIFY_HINT}") from None
