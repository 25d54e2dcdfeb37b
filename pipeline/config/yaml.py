"""YAML of recipes, profiles and --set: read and written, with the scalars of YAML 1.2 (core schema) and text as keys.

PyYAML by itself has those of YAML 1.1, where `on` is true, 010 is 8, 1:30 is 90 and 5e-7 is text.
"""

import pickle
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import yaml

from schemas import WinnowError

MAX_DEPTH = 100  # libyaml's own recursion ends the process at some ten thousand
MAX_BYTES = 1 << 20  # of a file: a recipe has a few thousand
MAX_NODES = 100_000  # aliases expanded, since merging copies what they stand for
TAG = "tag:yaml.org,2002:"
SCALARS = {  # as https://yaml.org/spec/1.2.2/#1032-tag-resolution has them; and `<<`, which merges a mapping
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.CSafeLoader):
    """Loader that refuses repeated keys, keys that are not text, values that contain themselves, and huge expansions.

    libyaml, which every wheel of PyYAML contains, because reading YAML was four fifths of the time of a plan.
    """

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012 - none of those of YAML 1.1
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: construct
        for tag, construct in yaml.CSafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(TAG) in ("str", "seq", "map")
    }

    def construct_document(self, node: Any) -> Any:
        _expanded(node, {})
        return super().construct_document(node)

    def construct_number(self, node: Any) -> Any:
        """Return null, a boolean or a number, also of a tag that is written: `!!int 010` is 10."""
        kind, text = node.tag.removeprefix(TAG), self.construct_scalar(node)
        if not re.fullmatch(SCALARS[kind][0], text):
            raise _problem_at(node, f"{text!r} is no {kind}")
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            case _:
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes what the loader would read as a number, and writes no aliases: what repeats is repeated."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _name, re.compile(f"^(?:{_pattern})$"), [*_first, *[""] * (_name == "null")])
    if _name != "merge":
        _Loader.add_constructor(TAG + _name, _Loader.construct_number)


def _problem_at(node: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _expanded(node: yaml.Node, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return number and depth of the nodes with aliases expanded. Raise YAMLError for what no recipe can contain."""
    if id(node) in sizes:
        if sizes[id(node)] == (0, 0):
            raise _problem_at(node, "a value that contains itself")
        return sizes[id(node)]
    sizes[id(node)] = 0, 0  # until all that it contains is counted
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{TAG}str", f"{TAG}merge"):
                written = f" {key.value}" if isinstance(key, yaml.ScalarNode) else ""
                raise _problem_at(key, f"the key{written} is not text; quote it")
            if key.value in keys:
                raise _problem_at(key, f"{key.value!r} is written twice")
            keys.add(key.value)
            children.append(value)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    inner = [_expanded(child, sizes) for child in children]
    size, depth = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
    if size > MAX_NODES:
        raise _problem_at(node, f"more than {MAX_NODES:,} values, those that aliases repeat included")
    if depth > MAX_DEPTH:
        raise _problem_at(node, f"more than {MAX_DEPTH} collections inside each other, by aliases")
    sizes[id(node)] = size, depth
    return size, depth


@lru_cache(maxsize=256)
def _pickled_content(text: str) -> bytes:
    """Return the content of a YAML text, once per text: a plan reads each of its files three times.

    Pickled, because callers change what they get. Raise YAMLError or ValueError.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):  # in a loop; to compose nodes, libyaml calls itself
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} collections inside each other"
            raise _problem_at(event, problem)
    return pickle.dumps(yaml.load(text, Loader=_Loader))


def parse(text: str, source: str) -> Any:
    """Return the content of a YAML text. Raise WinnowError that names the source, line and column."""
    try:
        return pickle.loads(_pickled_content(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
    except yaml.reader.ReaderError as error:
        where, problem = "", f"character {error.position} is {error.character!r}: {error.reason}"
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a number of more digits than Python reads
        where, problem = "", " ".join(str(error).split())
    raise WinnowError(f"{source}: not YAML: {where}{problem}")


def parse_items(text: str, source: str) -> list[str]:
    """Return the text of each value of a list without its brackets: `0.1, {a: 1, b: 2}` are two.

    Raise WinnowError as `parse` does.
    """
    line = f"[{' '.join(text.splitlines())}]"
    parse(line, source)
    node = yaml.compose(line, Loader=_Loader)
    assert isinstance(node, yaml.SequenceNode)
    return [line[item.start_mark.index : item.end_mark.index].strip() for item in node.value]


def read_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file. Raise WinnowError that says what the file is to the user: a recipe, ..."""
    source = f"{what} {path}"
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise WinnowError(f"{source}: is a pipe, a socket or a device; name a YAML file")
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise WinnowError(f"{source}: has more than {MAX_BYTES:,} bytes; name a YAML file of steps and options")
        return parse(path.read_text(encoding="utf-8-sig"), source)
    except FileNotFoundError:
        raise WinnowError(f"{source}: there is no such file in {path.resolve().parent}") from None
    except IsADirectoryError:
        raise WinnowError(f"{source}: is a folder; name a YAML file in it") from None
    except WinnowError:
        raise
    except (OSError, ValueError) as error:  # a ValueError: no UTF-8, or a null character in the name
        raise WinnowError(f"{source}: cannot be read ({error})") from None


def dump(content: Any) -> str:
    """Return text that `parse` reads as the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
