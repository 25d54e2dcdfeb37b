"""Digests of source code: of a registered function, and of all functions, classes and constants that it uses.

Names are resolved in source files and not in imported modules. The digests are therefore the same in every process,
whatever it has imported, and planning need not import torch for what a function imports when it is called.
"""

import ast
import gc
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec, resolve_name
from linecache import getlines
from pathlib import Path
from typing import Any

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign)


@dataclass(frozen=True, eq=False)
class SourceModule:
    """Top level of a module: the statement that defines each name, and the dotted name behind each import."""

    name: str
    label: str  # its name; of a plugin's file, whose module is named by its content, that of the file
    package: str  # that relative imports start from
    definitions: dict[str, ast.stmt]
    imports: dict[str, str]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which takes a third of the time: it visits the heap again while trees grow."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
@_collector_paused()
def code_digests(fn: Callable[..., Any]) -> dict[str, str]:
    """Return the digest of a function by its name, then those of all that it uses by `module.name`, sorted.

    What its source names is followed through its own package, `stages` and `schemas`: functions, classes, and the
    constants of modules (but not those of `schemas`, which are tables with their documentation). `pipeline` is not
    followed: it says how and where a stage runs. What is only known when a function runs, such as the method of an
    argument, is followed if its class is named somewhere on the way. Empty without source, as for a lambda.
    """
    fn = getattr(inspect.unwrap(fn), "py_func", inspect.unwrap(fn))  # numba's dispatchers have that
    module = _source_module(fn.__module__) or SourceModule(fn.__module__, fn.__module__, "", {}, {})
    node = module.definitions.get(fn.__name__)
    first_lines = {item.lineno for item in (node, *getattr(node, "decorator_list", ())) if item}
    if getattr(getattr(fn, "__code__", None), "co_firstlineno", None) not in first_lines:
        # A class, or a function in a notebook, in another function, or redefined further down
        try:
            node = ast.parse(textwrap.dedent(inspect.getsource(fn))).body[0]
        except (OSError, TypeError, SyntaxError, IndexError):
            return {}
    if not isinstance(node, DEFINITIONS):
        return {}
    digest, uses = _digest(node, module)
    names = list(uses)
    packages = {fn.__module__.partition(".")[0], "stages", "schemas"}
    digests: dict[str, str] = {}
    while names:
        dotted = names.pop()
        if dotted.partition(".")[0] in packages and (definition := _find(dotted)):
            owner, name = definition
            package, label, used = owner.name.partition(".")[0], f"{owner.label}.{name}", owner.definitions[name]
            is_table = package == "schemas" and isinstance(used, ASSIGNMENTS)
            if package in packages and label not in digests and used is not node and not is_table:
                digests[label], uses = _digest(used, owner)
                names += uses
    return {fn.__name__: digest} | dict(sorted(digests.items()))


@cache
def _digest(node: ast.stmt, module: SourceModule) -> tuple[str, tuple[str, ...]]:
    """Return the digest of a definition and the dotted names that it uses.

    Comments, layout, docstrings and its own decorators, which hold its version, do not count. It is one pass over the
    tree, because `ast.dump` and `ast.walk` take three times as long.
    """
    parts: list[str] = []
    chains: dict[str, None] = {}  # `name` and `name.attribute` as they are written, each once
    imports = dict(module.imports)

    def visit(item: ast.AST) -> str | None:
        """Add a node to the parts, and return its dotted name if it is one."""
        kind = item.__class__
        parts.append(kind.__name__)
        if isinstance(item, ast.Name):
            parts.append(item.id)
            chains[item.id] = None
            return item.id
        if isinstance(item, ast.Attribute):
            owner = visit(item.value)
            parts.append(item.attr)
            if owner:
                chains[f"{owner}.{item.attr}"] = None
            return owner and f"{owner}.{item.attr}"
        if isinstance(item, ast.Import | ast.ImportFrom):
            imports.update(_imports([item], module.package))
        for field in kind._fields:
            content = getattr(item, field)
            if field == "decorator_list" and item is node:
                continue
            if field == "body" and isinstance(item, DEFINITIONS) and ast.get_docstring(item, clean=False) is not None:
                content = content[1:]
            for value in content if isinstance(content, list) else [content]:
                if isinstance(value, ast.AST):
                    visit(value)
                else:
                    parts.append(repr(value))
            parts.append(field)  # where it ends: two lists that follow each other are not one
        return None

    visit(node)
    names = []
    for chain in chains:
        first, dot, rest = chain.partition(".")
        origin = imports.get(first) or (f"{module.name}.{first}" if first in module.definitions else None)
        if origin:
            names.append(f"{origin}{dot}{rest}")
    return sha256("\n".join(parts).encode()).hexdigest()[:12], tuple(names)


@cache
def _find(dotted: str) -> tuple[SourceModule, str] | None:
    """Return the module and the name in it of a definition; None for a dotted name that is a module or unknown."""
    first, *rest = dotted.split(".")
    module = _source_module(first)
    for position, name in enumerate(rest):
        if module is None:
            return None
        if name in module.definitions:
            return module, name
        origin = module.imports.get(name)
        if origin and origin != dotted:  # a package passes on what another module defines
            return _find(".".join([origin, *rest[position + 1 :]]))
        module = _source_module(f"{module.name}.{name}")
    return None


@cache
def _source_module(name: str) -> SourceModule | None:
    """Return a parsed module, without importing it (only the packages that it is in); None without source."""
    try:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            return None
        body = ast.parse("".join(getlines(spec.origin))).body
    except (ImportError, ValueError, SyntaxError):  # a ValueError is `__main__`
        return None
    for node in body:  # what stands under `if` and `try` is at the top level too; `body` grows while it is read
        if isinstance(node, ast.If | ast.Try):
            body += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    definitions: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, DEFINITIONS):
            definitions[node.name] = node
        elif isinstance(node, ASSIGNMENTS):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [item.id for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)]
            definitions |= dict.fromkeys(names, node)
    package = name if spec.submodule_search_locations else name.rpartition(".")[0]
    imports = _imports([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], package)
    return SourceModule(name, name if spec.loader else Path(spec.origin).stem, package, definitions, imports)


def _imports(nodes: Iterable[ast.Import | ast.ImportFrom], package: str) -> dict[str, str]:
    """Return the dotted name behind each name that the statements import."""
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names |= {item.asname or item.name: f"{origin}.{item.name}" for item in node.names}
        else:  # `import a.b` binds `a`, and `import a.b as c` binds `a.b`
            for item in node.names:
                first = item.name.partition(".")[0]
                names[item.asname or first] = item.name if item.asname else first
    return names
