"""YAML as recipes and --set read it, and as it is written for them."""

import re
from typing import Any

import yaml

from schemas import WinnowError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: plain PyYAML reads 5e-7 as a string. A name given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value]
        if double := {name for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {sorted(double)[0]!r} stands twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would read as a number; spells out what is said twice, for names may not stand twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for each in (_Loader, _Dumper):
    each.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$|^[-+]?[0-9]+\.[0-9]*$|^[-+]?\.(inf|Inf)$"),
        list("-+0123456789."),
    )


def parse(text: str, place: str) -> Any:
    """The content; raises WinnowError that names the place."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date that does not exist
        raise WinnowError(f"{place}: not YAML: {' '.join(str(error).split())}") from None


def written(content: Any) -> str:
    """Text that `parse` reads as the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
