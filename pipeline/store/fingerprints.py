"""Files and folders as options of a stage: their content is part of a key, their path is not."""

import json
import os
import time
from contextlib import suppress
from functools import cached_property, lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from pipeline.store.hub import download_command, is_hub_name, snapshot
from pipeline.store.storage import cache, replace
from pipeline.store.weights import INDEX, damage, is_lfs_pointer, weight_files, weight_problems

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "winnow:"  # prefix of an adapter's base model name if the base is a policy of ours: the policy's digest follows
# Key of a copy's tokenizer_config.json: digests of the policy that it is a copy of, but for defaults in its chat
# templates, and of its network, which is then still the policy's.
COPY_OF = "winnow_copy_of"
# And weights; those of an adapter in the folder of its base are in no index.
MODEL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "additional_chat_templates/*.jinja", ADAPTER_WEIGHTS)
CARD = "README.md"  # of a model folder; what it says is no part of the model, and in no digest
MISSING = "no such file or folder"  # what a message about a path says
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

LARGE_FILE = 1 << 26  # bytes; a smaller file is read as fast as its digest is looked up
SETTLED_AFTER = 2 * 10**9  # nanoseconds; a file changed more recently may change again within one tick of the clock


class ContentPath:
    """Path that stands for its content: checked when the recipe is read, hashed when a key needs its digest.

    The content is that of this first time, on workers too: what a step reads later must be the same (`changes`).
    """

    def __init__(self, path: str) -> None:
        self.written = path
        if not path.strip():
            raise ValueError("is empty; give a file or folder, or leave it out")
        try:
            self.path = Path(path).expanduser().resolve()
            is_special = self.path.exists() and not (self.path.is_file() or self.path.is_dir())
        except (RuntimeError, OSError) as error:  # no such user, a loop of links, a name that is too long
            cause = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{path[:200]!r} is no path ({cause})") from None
        if is_special:
            raise ValueError(f"{self.path} is neither a file nor a folder, but a pipe, a socket or a device")
        self.check()

    @cached_property
    def contents(self) -> dict[str, str]:
        """Return the digest of each file by its name in the folder, of a single file as `.`."""
        return digests_of(self.path, self.files())

    @property
    def digest(self) -> str:
        return _digest_of_all(self.contents)

    def files(self) -> list[Path] | None:
        """Return the files of the folder that count, None if all do."""
        return None

    def changes(self) -> list[str]:
        """Return the paths of files that changed, came or went since `contents` was read."""
        now = digests_of(self.path, self.files())
        names = sorted(name for name, _ in self.contents.items() ^ now.items())
        return [str(self.path / name) for name in dict.fromkeys(names)]

    def states(self) -> dict[str, tuple[int, ...]]:
        """Return numbers of each file, by its path, that change whenever somebody writes to it, whatever he writes."""
        return {str(file): _file_state(file) for file in _files_of(self.path, self.files())}

    @property
    def source(self) -> str:
        """Return what people know the content by: the name of the file or folder, without the machine's folders."""
        return self.path.name

    def check(self) -> None:
        """Raise ValueError if the path is not what the class says."""
        if not self.path.exists():
            hint = "" if Path(self.written).expanduser().is_absolute() else "; a path beside the config begins with ./"
            raise ValueError(f"{MISSING}: {self.path}{hint}")

    def __repr__(self) -> str:
        return str(self.path)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema(strict=True))


class DataPath(ContentPath):
    """Data file, or a folder of data files."""


class TemplatePath(ContentPath):
    """Jinja file with one chat template."""

    def check(self) -> None:
        from jinja2 import Environment, TemplateSyntaxError

        super().check()
        if not self.path.is_file():
            raise ValueError(f"{self.path} is a folder; give the Jinja file with the chat template")
        try:
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(self.path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is not text in UTF-8") from None
        except TemplateSyntaxError as error:
            if "tag 'generation'" not in str(error):  # of transformers, which marks what is trained on by it
                raise ValueError(f"{self.path}, line {error.lineno}: {error.message}") from None


class HubPath(ContentPath):
    """Folder on this machine, or `org/name` of the hub, which is then a snapshot in the hub's cache.

    A name with a revision is always one of the hub. Without one it is the folder of that name below the working folder
    if there is one, as transformers has it, and refused if the cache has the name too: one config would mean different
    models in different working folders.
    """

    revision_option: str  # the option beside it that says which revision; declared before it, to be known here

    def __init__(self, path: str, revision: str | None = None) -> None:
        self.hub_name = path if is_hub_name(path) and (revision or not Path(path).exists()) else None
        if self.hub_name is None:
            if revision is not None:
                raise ValueError(
                    f"{path} is a folder on this machine, which has no revisions: unset `{self.revision_option}`"
                )
            if is_hub_name(path) and snapshot(path, None, MODEL_FILES):
                raise ValueError(
                    f"{path} is a folder here and a model in the hub's cache: write ./{path} for the folder, or set "
                    f"`{self.revision_option}` (such as main) for the hub's"
                )
            super().__init__(path)
            return
        folder = snapshot(path, revision, MODEL_FILES)
        if folder is None:
            at = f" at revision {revision}" if revision else ""
            raise ValueError(
                f"no such folder: {Path(path).resolve()}, and the hub's cache does not have {path}{at}; "
                f"`{download_command(path, revision)}` fetches it"
            )
        super().__init__(str(folder))
        self.written = path

    @property
    def source(self) -> str:
        return f"{self.hub_name}@{self.path.name}" if self.hub_name else super().source

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(path: str, info: core_schema.ValidationInfo) -> HubPath:
            return cls(path, (info.data or {}).get(cls.revision_option))

        return core_schema.with_info_after_validator_function(read, core_schema.str_schema(strict=True))


class ModelPath(HubPath):
    """Hugging Face model: config, tokenizer, and weights as safetensors (pickles are rejected)."""

    revision_option = "revision"

    def check(self) -> None:
        super().check()
        parts = {
            "config.json": (self.path / "config.json").is_file(),
            "weights as *.safetensors": any(file.is_file() for file in self.path.glob("*.safetensors")),
            "tokenizer": any((self.path / name).is_file() for name in TOKENIZER_FILES),
        }
        if missing := [part for part, exists in parts.items() if not exists]:
            raise ValueError(f"model folder {self.path} has no {', no '.join(missing)}")
        problems = weight_problems(self.path) or pointer_problems(self.path)
        # A policy trained here may be one folder of weights, their index and an adapter, which every stage reads.
        if (self.path / ADAPTER).is_file() and not all(
            (self.path / name).is_file() for name in (ADAPTER_WEIGHTS, INDEX)
        ):
            problems.append(
                f"it holds {ADAPTER} too, and transformers would add that adapter, and vLLM not: give the adapter's "
                "folder as `adapter`, and its base, without that file, as `path`"
            )
        if problems:
            raise ValueError("; ".join(f"model folder {self.path}: {problem}" for problem in problems))

    def files(self) -> list[Path]:
        return model_files(self.path)


class AdapterPath(HubPath):
    """PEFT folder of one LoRA: its config, its weights as safetensors, and optionally a tokenizer."""

    revision_option = "adapter_revision"

    def check(self) -> None:
        super().check()
        if missing := [name for name in (ADAPTER, ADAPTER_WEIGHTS) if not (self.path / name).is_file()]:
            raise ValueError(f"adapter folder {self.path} has no {', no '.join(missing)}")
        if (kind := self._config().get("peft_type")) != "LORA":
            raise ValueError(f"adapter folder {self.path} holds a {kind}; only a LORA can be merged")
        if problems := damage(self.path / ADAPTER_WEIGHTS) or pointer_problems(
            self.path
        ):  # which would otherwise fail only on a GPU
            raise ValueError(f"adapter folder {self.path}: {problems[0]}")

    def _config(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / ADAPTER).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path / ADAPTER} is not a JSON object ({error}); copy it again") from None

    @property
    def base(self) -> str | None:
        """Return the digest of the policy it was trained from, or None if that was not a policy of a store."""
        name = str(self._config().get("base_model_name_or_path"))
        return name.removeprefix(BASE) if name.startswith(BASE) else None

    def files(self) -> list[Path]:
        return model_files(self.path)


def model_files(folder: Path) -> list[Path]:
    """Return the files that determine what a model computes, sorted by name."""
    files = {*weight_files(folder), *(file for pattern in MODEL_FILES for file in folder.glob(pattern))}
    return sorted(file for file in files if file.is_file())


def pointer_problems(folder: Path) -> list[str]:
    """Return which files of a model, its tokenizer among them, git left as pointers."""
    files = [file for file in model_files(folder) if is_lfs_pointer(file)]
    return [f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`" for file in files]


def model_digest(folder: Path) -> str:
    """Return the digest of a model folder: weights, config, tokenizer and chat template, and no other file."""
    return digest_of(folder, model_files(folder))


def policy_of_copy(folder: Path) -> str | None:
    """Return the digest of the policy of a store that a folder is a copy of, with other chat templates; else None.

    An adapter of one fits the other: their networks are the same.
    """
    with suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        record = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))[COPY_OF]
        if record["network"] == network_digest(folder):
            return str(record["policy"])
    return None


def network_digest(folder: Path) -> str:
    """Return the digest of a model folder's config and weights, those of an adapter beside them included."""
    return digest_of(folder, [folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def digest_of(path: Path, files: list[Path] | None = None) -> str:
    """Return the digest of a file's bytes, or of files (all) in a folder with their relative names; 64 hex digits."""
    return _digest_of_all(digests_of(path, files))


def digests_of(path: Path, files: list[Path] | None = None) -> dict[str, str]:
    """Return the digests of files (all) in a folder by their relative names, or that of a file as `.`."""
    return {
        file.relative_to(path).as_posix(): _digest_of_file(file, _file_state(file)) for file in _files_of(path, files)
    }


def _files_of(path: Path, files: list[Path] | None) -> list[Path]:
    """Return a file, or those of a folder that count: all if `files` is None."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file()) if files is None else files


def _digest_of_all(digests: dict[str, str]) -> str:
    if digests.keys() == {"."}:
        return digests["."]
    lines = (f"{name} {digest}\n" for name, digest in digests.items())
    return sha256("".join(lines).encode()).hexdigest()


def _file_state(path: Path) -> tuple[int, ...]:
    """Return numbers that change when the file's content changes; ctime is one of them because nobody can set it."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


@lru_cache(maxsize=4096)
def _digest_of_file(path: Path, state: tuple[int, ...]) -> str:
    """Return the SHA-256 of a file that is in this state.

    That of a large file is cached on disk, so that a model of many gigabytes is read once and not for every plan.
    """
    is_large = state[0] >= LARGE_FILE
    entry = _cache_entry(path)
    if is_large:
        with suppress(OSError, ValueError, KeyError, TypeError):  # no entry, or a damaged one
            cached = json.loads(entry.read_text())
            if cached["state"] == list(state):
                return str(cached["digest"])
    settled = time.time_ns() - max(state[1:3]) > SETTLED_AFTER
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if is_large and settled and _file_state(path) == state:  # else it may have changed while it was read
        with suppress(OSError):  # without room for the entry, the file is read again next time
            replace(entry, json.dumps({"path": str(path), "state": state, "digest": digest}).encode(), durable=False)
    return digest


def _cache_entry(path: Path) -> Path:
    return cache() / "digests" / f"{sha256(str(path).encode()).hexdigest()[:32]}.json"


def forget_digests(folder: Path) -> None:
    """Let the digests of a folder's files be computed anew: a fault of a disk leaves their times as they were."""
    _digest_of_file.cache_clear()
    for file in folder.rglob("*"):
        with suppress(OSError):
            _cache_entry(file).unlink(missing_ok=True)
