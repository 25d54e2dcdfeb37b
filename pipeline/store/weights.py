"""Weight files of a Hugging Face folder: the ones that every loader reads, or the reasons why loaders would differ.

transformers reads `model.safetensors`, and the index only where there is none. vLLM reads all *.safetensors that the
index names, all of them where there is no index, and `consolidated*.safetensors` alone where there is one.
"""

import json
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs"  # how the pointer begins that git leaves in place of a large file
CHECKED_BYTES = 1 << 22  # of each file's smallest tensors, which a plan reads: norms and biases of most models
# Unsigned integers of the width of a number type, and the bits of its exponent: NaN and infinity have all of them.
EXPONENTS = {
    "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights, sorted: those that the index names, `model.safetensors`, or else all."""
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder).values()))]
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def tensor_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    """Return the shape of each tensor by name, from the headers alone."""
    shapes: dict[str, list[int]] = {}
    for path in files:
        with safe_open(path, "np") as file:
            shapes |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    return shapes


def tensor_types(files: Iterable[Path]) -> dict[str, str]:
    """Return the number type of each tensor by name, as headers write it: F32, BF16, I8."""
    types: dict[str, str] = {}
    for path in files:
        with safe_open(path, "np") as file:
            types |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no dict
    return types


def not_finite(files: Iterable[Path]) -> dict[str, int]:
    """Return how many numbers are NaN or infinite, by the name of their tensor, in the smallest tensors of each file.

    What diverged is so everywhere; numpy has no bfloat16, so that bits are compared.
    """
    counts: dict[str, int] = {}
    for path in files:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            remaining = CHECKED_BYTES
            for name, tensor in sorted(header.items(), key=lambda item: int(np.diff(item[1]["data_offsets"])[0])):
                begin, end = tensor["data_offsets"]
                remaining -= end - begin
                if remaining < 0:
                    break
                if tensor["dtype"] in EXPONENTS:
                    kind, exponent = EXPONENTS[tensor["dtype"]]
                    file.seek(start + begin)
                    bits = np.frombuffer(file.read(end - begin), kind)
                    if count := int(((bits & kind(exponent)) == exponent).sum()):
                        counts[name] = count
    return counts


def weight_problems(folder: Path) -> list[str]:
    """Return why these files are not one set of weights: files of two, some that are missing, damaged ones."""
    names = [file.name for file in sorted(folder.glob("*.safetensors")) if file.is_file()]
    if not (folder / INDEX).is_file():
        shards = [name for name in names if "-of-" in name]
        if ONE_FILE in names and not shards:
            return damage(folder / ONE_FILE)
        if ONE_FILE in names:
            return [
                f"it holds {ONE_FILE} and {shards[0]} ({len(shards)} such files), which would be two sets of weights: "
                "remove the one that is not the model's"
            ]
        return [
            f"it holds {names[0]} ({len(names)} weight files), but neither {ONE_FILE} nor {INDEX}, which says what is "
            "in which file: copy the index too, or save the model anew with `save_pretrained`"
        ]

    try:
        expected = _weight_map(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{INDEX} has no weight_map ({type(error).__name__}: {error}); copy it again"]
    files = sorted(set(expected.values()))
    if missing := [name for name in files if name not in names]:
        return [f"{INDEX} names {missing[0]} ({len(missing)} such files), which is not there: copy it too"]
    if ONE_FILE in names and ONE_FILE not in files:
        return [
            f"it holds {ONE_FILE} and the files of {INDEX} ({files[0]}), which would be two sets of weights: vLLM "
            "samples from those of the index, and transformers trains the other; remove the one that is not the model's"
        ]
    if problems := [problem for name in files for problem in damage(folder / name)]:
        return problems
    actual = {name: {*tensor_shapes([folder / name])} for name in files}
    for tensor, name in expected.items():
        if tensor not in actual[name]:
            return [f"{INDEX} says that {tensor} is in {name}, and it is not: index and weights are of two models"]
    if unlisted := [tensor for name in files for tensor in sorted(actual[name]) if expected.get(tensor) != name]:
        return [f"{INDEX} does not say where {unlisted[0]} ({len(unlisted)} such tensors) is: it is of another model"]
    return []


def damage(path: Path) -> list[str]:
    """Return the reason why a file cannot be read as safetensors, if it cannot."""
    try:  # the header, and whether the file is as long as that says
        safe_open(path, "np")
    except SafetensorError as error:
        if is_lfs_pointer(path):
            return [f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`"]
        return [f"{path} is truncated or not a safetensors file ({error}); copy it again"]
    return []


def let_others_read(folder: Path) -> None:
    """Give weights that safetensors wrote, which it keeps to their owner, the permissions of the files beside them."""
    mode = next(file.stat().st_mode for file in folder.glob("*.json"))
    for file in folder.glob("*.safetensors"):
        file.chmod(stat.S_IMODE(mode))


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is what Git LFS leaves in place of a large one."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index says."""
    return dict(json.loads((folder / INDEX).read_text())["weight_map"].items())
