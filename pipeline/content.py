"""Files and folders as options: what they hold is their identity, where they lie is not."""

from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

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
        missing = [what for what, there in self._parts() if not there]
        if missing:
            raise ValueError(f"model folder {self.path} has no {', no '.join(missing)}")

    def _parts(self) -> list[tuple[str, bool]]:
        return [
            ("config.json", (self.path / "config.json").is_file()),
            ("weights as *.safetensors", any(self.path.glob("*.safetensors"))),
            ("tokenizer", any((self.path / name).is_file() for name in TOKENIZER_FILES)),
        ]

    @property
    def digest(self) -> str:
        return model_digest(self.path)


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
