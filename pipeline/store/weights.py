"""Weight files of a Hugging Face folder: the ones that every loader reads, or the reasons why loaders would differ.

transformers reads `model.safetensors`, and the index only where there is none. vLLM reads all *.safetensors that the
index names, all of them where there is no index, and `consolidated*.safetensors` alone where there is one.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs"  # how the pointer begins that git leaves in place of a large file


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights, sorted: those that the index names, `model.safetensors`, or else all."""
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder).values()))]
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    return sorted(folder.glob("*.safetensors"))


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


def weight_problems(folder: Path) -> list[str]:
    """Return why these files are not one set of weights: files of two, some that are missing, damaged ones."""
    names = [file.name for file in sorted(folder.glob("*.safetensors"))]
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
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS)) == LFS
        if is_pointer:
            return [f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`"]
        return [f"{path} is truncated or not a safetensors file ({error}); copy it again"]
    return []


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index says."""
    return dict(json.loads((folder / INDEX).read_text())["weight_map"].items())
