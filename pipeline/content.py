"""Files and folders as options: what they hold is their identity, where they lie is not."""

import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

ADAPTER = "adapter_config.json"
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class ContentPath:
    """A path that stands for its content. Checked when the recipe is read, hashed once a process."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser().resolve()
        self.check()

    @property
    def digest(self) -> str:
        return digest_of(self.path)

    def check(self) -> None:
        if not self.path.exists():
            raise ValueError(f"no such file or folder: {self.path}")

    def __repr__(self) -> str:
        return str(self.path)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> "CoreSchema":
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema(strict=True))


class DataPath(ContentPath):
    """A data file, or a folder of them."""


class ModelPath(ContentPath):
    """A Hugging Face model folder: config, tokenizer, and weights as safetensors (pickles are refused)."""

    def check(self) -> None:
        super().check()
        check_parts(f"model folder {self.path}", self._parts())

    def _parts(self) -> list[tuple[str, bool]]:
        return [
            ("config.json", (self.path / "config.json").is_file()),
            ("weights as *.safetensors", any(self.path.glob("*.safetensors"))),
            ("tokenizer", any((self.path / name).is_file() for name in TOKENIZER_FILES)),
        ]

    @property
    def digest(self) -> str:
        return model_digest(self.path)


class AdapterPath(ContentPath):
    """A folder of peft's with one LoRA: its config, its weights as safetensors, and perhaps a tokenizer of its own."""

    def check(self) -> None:
        super().check()
        parts = {ADAPTER: self.path / ADAPTER, "adapter_model.safetensors": self.path / "adapter_model.safetensors"}
        check_parts(f"adapter folder {self.path}", [(name, file.is_file()) for name, file in parts.items()])
        if (kind := json.loads(parts[ADAPTER].read_text()).get("peft_type")) != "LORA":
            raise ValueError(f"adapter folder {self.path} holds a {kind}, and what is merged is a LORA")

    @property
    def digest(self) -> str:
        return model_digest(self.path)


def check_parts(place: str, parts: list[tuple[str, bool]]) -> None:
    """Raises ValueError with all that is not there."""
    if missing := [what for what, there in parts if not there]:
        raise ValueError(f"{place} has no {', no '.join(missing)}")


def model_files(folder: Path) -> list[Path]:
    """The files that make a model what it is, sorted by name."""
    return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})


def model_digest(folder: Path) -> str:
    """Digest of a model folder's content: weights, config, tokenizer, chat template."""
    return _digest_files(folder, model_files(folder))


def digest_of(path: Path) -> str:
    """Digest of a file's bytes, or of all files in a folder with their relative names."""
    if path.is_file():
        return _digest_file(path, path.stat().st_size, path.stat().st_mtime_ns)
    return _digest_files(path, sorted(file for file in path.rglob("*") if file.is_file()))


def _digest_files(folder: Path, files: list[Path]) -> str:
    lines = (f"{file.relative_to(folder).as_posix()} {digest_of(file)}\n" for file in files)
    return sha256("".join(lines).encode()).hexdigest()


@lru_cache(maxsize=4096)
def _digest_file(path: Path, size: int, modified: int) -> str:
    """Size and time are only here so that a changed file is read again."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
