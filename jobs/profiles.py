"""Profiles by name (jobs/profiles/*.yaml), or of any YAML file."""

from pathlib import Path

import stages.all  # noqa: F401 - registers every stage
from pipeline.registry import nearest
from pipeline.resources import Profile, load_profile
from pipeline.stage import stages as registry
from schemas import WinnowError

FOLDER = Path(__file__).parent / "profiles"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def profile_path(profile: str) -> Path:
    """Return the file of a shipped profile, or the YAML file itself. Raise WinnowError for an unknown name."""
    path = Path(profile)
    if path.suffix in (".yaml", ".yml"):
        return path
    if profile not in names():
        raise WinnowError(f"--profile {profile!r}: unknown; {nearest(profile, names())}; or give a YAML file")
    return FOLDER / f"{profile}.yaml"


def load(profile: str | None) -> Profile:
    """Return the resources per stage; without a profile, stages share what Ray has. Raise WinnowError for mistakes."""
    return load_profile(profile_path(profile), list(registry.entries)) if profile else Profile()
