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
    """A profile of ours by name, or any YAML file."""
    path = Path(profile)
    if path.suffix in (".yaml", ".yml"):
        return path
    if profile not in names():
        raise WinnowError(f"--profile {profile!r}: unknown; {nearest(profile, names())}; or give a YAML file")
    return FOLDER / f"{profile}.yaml"


def load(profile: str | None) -> Profile:
    """What each stage is given; of no profile, what Ray has, shared. Raises WinnowError with all that is wrong."""
    return load_profile(profile_path(profile), list(registry.entries)) if profile else Profile()
