"""Models and data sets by their names on the Hugging Face hub, read from its own cache on this machine.

`hf download` fills the cache, and nothing is looked up on a network here: what a plan refers to must not depend on what
a branch holds at that moment, and machines that compute often have no way out.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")  # org/name


def is_hub_name(text: str) -> bool:
    """Return whether a path could be a name on the hub: two words with one slash, and no `./`, `/` or `~` before."""
    return NAME.fullmatch(text) is not None


def download_command(name: str, revision: str | None, kind: Kind = "model") -> str:
    """Return the command that fetches a model or data set into the hub's cache."""
    words = ["hf", "download", name, *(["--repo-type", "dataset"] if kind == "dataset" else [])]
    return " ".join([*words, *(["--revision", revision] if revision else [])])


def snapshot(name: str, revision: str | None, files: Sequence[str] | None = None, kind: Kind = "model") -> Path | None:
    """Return the folder of a model or data set in the hub's cache, `snapshots/<commit>`; None if it is not there.

    revision: a branch, a tag or a commit; None is the main branch, as it was when it was last downloaded. files:
    patterns of those that are needed; others, such as weights in another format, may be missing. Raises ValueError for
    a name that the hub does not have, and for a download that was interrupted.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

    patterns = None if files is None else list(files)
    try:
        return Path(
            snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True, allow_patterns=patterns)
        )
    except HFValidationError as error:
        raise ValueError(f"{name} is no name of the hub ({error})") from None
    except IncompleteSnapshotError:
        raise ValueError(
            f"{name} is incomplete in {constants.HF_HUB_CACHE}: run `{download_command(name, revision, kind)}` again"
        ) from None
    except LocalEntryNotFoundError:
        return None
