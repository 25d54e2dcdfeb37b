"""YAML of recipes, profiles and --set: read and written."""

import re
from pathlib import Path
from typing import Any

import yaml

from schemas import WinnowError


class _Loader(yaml.CSafeLoader):
    """Loader with the floats of YAML 1.2 (plain PyYAML reads 5e-7 as a string), and without repeated keys.

    libyaml, which every wheel of PyYAML contains, because reading YAML was four fifths of the time of a plan.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {repeated[0]!r} is written twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes what the loader would read as a number, and writes no aliases: what repeats is repeated."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$|^[-+]?[0-9]+\.[0-9]*$|^[-+]?\.(inf|Inf)$"),
        list("-+0123456789."),
    )


def parse(text: str, source: str) -> Any:
    """Return the content of a YAML text. Raise WinnowError that names the source."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date that does not exist
        raise WinnowError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file. Raise WinnowError that says what the file is to the user: a recipe, ..."""
    source = f"{what} {path}"
    try:
        return parse(path.read_text(encoding="utf-8"), source)
    except FileNotFoundError:
        raise WinnowError(f"{source}: there is no such file in {path.resolve().parent}") from None
    except IsADirectoryError:
        raise WinnowError(f"{source}: is a folder; name a YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise WinnowError(f"{source}: cannot be read ({error})") from None


def dump(content: Any) -> str:
    """Return text that `parse` reads as the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
