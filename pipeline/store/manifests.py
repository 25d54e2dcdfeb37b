"""Validation of the JSON files of a store before any other code relies on them.

A store may have been copied, edited or written by somebody else, and SQL is built from what it says: names are checked
here, so that no statement and no path is ever made of an unchecked one.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, RootModel, StringConstraints

from pipeline.registry import validated
from schemas import WinnowError

FORMAT = 1  # of manifests; a manifest with a larger number was written by a later version of this code

PlainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # no separator, glob or quote


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


class StepLink(StrictModel):
    """Where a step of a run is stored: `<store>/<stage>/<key>/`."""

    stage: str
    key: str


class RunLinks(RootModel[dict[str, StepLink]]):
    """Steps of a run by name."""


def checked_format(path: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest that was read from `path`; raise WinnowError if a later version of this code wrote it."""
    if manifest.get("format", FORMAT) > FORMAT:
        raise WinnowError(
            f"{path}: has format {manifest['format']}, and this version of Winnow reads up to {FORMAT}; update Winnow "
            "to the version that wrote it"
        )
    return manifest


def checked_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest as it is; its item `folder` says where it was read from.

    Raises WinnowError if a field is missing or has another type, if it lists a file outside its own folder, or if it
    lies in the folder of another step.
    """
    folder = manifest["folder"]
    path = f"{folder}/manifest.json"
    checked_format(path, manifest)
    try:
        validated(Manifest, manifest)
    except WinnowError as error:
        reason = f"{error.problems[0]:.200}"
        raise WinnowError(f"{path}: not a valid manifest ({reason}); delete its folder and run again") from None
    if [manifest["stage"], manifest["key"]] != folder.rstrip("/").split("/")[-2:]:
        raise WinnowError(
            f"{path}: it belongs to {manifest['stage']}/{manifest['key']}; move its folder there, or delete it"
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
        raise WinnowError(f"run {name!r}: its file in runs/ is not valid ({reason}); delete it") from None
