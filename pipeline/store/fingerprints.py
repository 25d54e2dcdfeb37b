"""Files and folders as options: what they hold is their identity, where they lie is not."""

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.store.file_digests import digest_of_file

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "winnow:"  # begins the name of an adapter's base where it is the digest of a policy
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class ContentPath:
    """A path that stands for its content. Checked when the recipe is read, hashed once."""

    def __init__(self, path: str) -> None:
        self.written = path
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
        parts = [(name, (self.path / name).is_file()) for name in (ADAPTER, ADAPTER_WEIGHTS)]
        check_parts(f"adapter folder {self.path}", parts)
        if (kind := self._config().get("peft_type")) != "LORA":
            raise ValueError(f"adapter folder {self.path} holds a {kind}, and what is merged is a LORA")
        if not is_whole(self.path / ADAPTER_WEIGHTS):
            raise ValueError(f"{self.path / ADAPTER_WEIGHTS} is torn: it is no whole safetensors file; copy it again")

    def _config(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / ADAPTER).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path / ADAPTER} is no JSON object ({error}); copy it again") from None

    @property
    def base(self) -> str | None:
        """Digest of the policy that it was trained from, if that was one of ours."""
        name = str(self._config().get("base_model_name_or_path"))
        return name.removeprefix(BASE) if name.startswith(BASE) else None

    @property
    def digest(self) -> str:
        return model_digest(self.path)


def check_parts(place: str, parts: list[tuple[str, bool]]) -> None:
    """Raises ValueError with all that is not there."""
    if missing := [what for what, there in parts if not there]:
        raise ValueError(f"{place} has no {', no '.join(missing)}")


def is_whole(file: Path) -> bool:
    """Is this safetensors file as long as its header says? The length of the header stands in its first 8 bytes."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            tensors = json.loads(stream.read(min(length, file.stat().st_size)))
            ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
            return bool(8 + length + max(ends, default=0) == file.stat().st_size)
        except (ValueError, KeyError, TypeError, AttributeError):
            return False


def model_files(folder: Path) -> list[Path]:
    """The files that make a model what it is, sorted by name."""
    return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})


def model_digest(folder: Path) -> str:
    """Digest of a model folder's content: weights, config, tokenizer, chat template."""
    return _digest_files(folder, model_files(folder))


def digest_of(path: Path) -> str:
    """Digest of a file's bytes, or of all files in a folder with their relative names."""
    if path.is_file():
        return digest_of_file(path)
    return _digest_files(path, sorted(file for file in path.rglob("*") if file.is_file()))


def _digest_files(folder: Path, files: list[Path]) -> str:
    lines = (f"{file.relative_to(folder).as_posix()} {digest_of(file)}\n" for file in files)
    return sha256("".join(lines).encode()).hexdigest()
