"""Digests of source code: of a registered function, and of all functions, classes and constants that it uses.

Names are resolved in source files and not in imported modules. The digests are therefore the same in every process,
whatever it has imported, and planning need not import torch for what a function imports when it is called.
"""

import ast
import gc
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec, resolve_name
from linecache import getlines
from pathlib import Path
from typing import Any

FORMAT = "2:"  # begins a digest: another number where other parts of the source count, for such say nothing together
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
PACKAGES = ("schemas", "stages")  # that are followed, beside a function's own
WITHOUT_EFFECT = {
    "version",
    "aliases",
    "check",
    "cost",
    "which_rows",
    "goes_on",
    "by_prompt",
    "omits",
    "batch",
    "candidate_columns",
}  # keywords of a decorator that change no result


@dataclass(frozen=True, eq=False)
class SourceModule:
    """Top level of a module: the statements that define or change each name, and the dotted name behind each import."""

    name: str
    label: str  # its name; of a plugin's file, whose module is named by its content, that of the file
    package: str  # that relative imports start from
    definitions: dict[str, list[ast.stmt]]  # in order; of a name that a loop or a condition sets, all of that
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
    constants of modules (but neither those of `schemas`, which are tables with their documentation, nor registries,
    which say what can be registered). `pipeline` is not
    followed: it says how and where a stage runs. What is only known when a function runs, such as the method of an
    argument, is followed if its class is named somewhere on the way; a star import is not. Empty without source, as
    for a lambda.
    """
    fn = getattr(inspect.unwrap(fn), "py_func", inspect.unwrap(fn))  # numba's dispatchers have that
    module = _source_module(fn.__module__) or SourceModule(fn.__module__, fn.__module__, "", {}, {})
    first_line = getattr(getattr(fn, "__code__", None), "co_firstlineno", None)
    statements = module.definitions.get(fn.__name__, [])
    node = next(
        (
            item
            for item in statements
            if first_line in [item.lineno, *(line.lineno for line in getattr(item, "decorator_list", []))]
        ),
        None,
    )
    if node is None:  # a class, or a function in a notebook or in another function
        try:
            node, statements = ast.parse(textwrap.dedent(inspect.getsource(fn))).body[0], []
        except (OSError, TypeError, SyntaxError, IndexError):
            return {}
    if not isinstance(node, DEFINITIONS):
        return {}
    # Without others of its name, which are other functions
    sources = (*(item for item in statements if not isinstance(item, DEFINITIONS)), node)
    digest, uses = _digest(sources, module)
    names = list(uses)
    packages = {fn.__module__.partition(".")[0], *PACKAGES}
    digests: dict[str, str] = {}
    while names:
        dotted = names.pop()
        if dotted.partition(".")[0] in packages and (definition := _find(dotted)):
            owner, name, _ = definition
            package, label, used = owner.name.partition(".")[0], f"{owner.label}.{name}", owner.definitions[name]
            is_table = package == "schemas" and not any(isinstance(item, DEFINITIONS) for item in used)
            if (
                package in packages
                and label not in digests
                and node not in used
                and not (is_table or _is_registry(used))
            ):
                digests[label], uses = _digest(tuple(used), owner)
                names += uses
    return {fn.__name__: digest} | dict(sorted(digests.items()))


def _is_registry(statements: list[ast.stmt]) -> bool:
    """Return whether they are `x = Registry(...)` or `x = y.decorator(...)`, which say what can be registered."""
    match statements:
        case [ast.Assign(value=ast.Call(func=ast.Name("Registry") | ast.Attribute(attr="decorator")))]:
            return True
    return False


@cache
def _digest(statements: tuple[ast.stmt, ...], module: SourceModule) -> tuple[str, tuple[str, ...]]:
    """Return the digest of the statements that define a name, and the dotted names that they use.

    Comments, layout, docstrings and WITHOUT_EFFECT do not count. A name counts as what it refers to, not as how it was
    imported: in the packages that are followed, by the name of the definition, which may move to another module. It is
    one pass over the tree, because `ast.dump` and `ast.walk` take three times as long.
    """
    parts: list[str] = []
    chains: list[tuple[int, str]] = []  # `name` or `name.attribute` as written, and where it stands among the parts
    imports = dict(module.imports)
    decorators: set[ast.expr] = set()

    def visit(item: ast.AST) -> None:
        kind = item.__class__
        if chain := _chain(item):
            chains.append((len(parts), chain))
            parts.append(chain)
            return
        if isinstance(item, ast.Import | ast.ImportFrom):
            imports.update(_imports([item], module.package))
            return
        if isinstance(item, DEFINITIONS):
            decorators.update(item.decorator_list)
        parts.append(kind.__name__)
        for field in kind._fields:
            content = getattr(item, field)
            if field == "body" and isinstance(item, DEFINITIONS) and ast.get_docstring(item, clean=False) is not None:
                content = content[1:]
            if field == "keywords" and item in decorators:
                content = [keyword for keyword in content if keyword.arg not in WITHOUT_EFFECT]
            for value in content if isinstance(content, list) else [content]:
                if isinstance(value, ast.AST):
                    visit(value)
                else:
                    parts.append(repr(value))
            parts.append(field)  # where it ends: two lists that follow each other are not one

    for statement in statements:
        visit(statement)

    names: dict[str, None] = {}
    for position, chain in chains:  # only now, because a function may import a name below its first use
        first, dot, rest = chain.partition(".")
        origin = imports.get(first) or (f"{module.name}.{first}" if first in module.definitions else None)
        if origin is None:  # a variable, or a name of Python
            continue
        dotted = f"{origin}{dot}{rest}"
        package = dotted.partition(".")[0]
        parts[position] = f"import {dotted}"
        if package == "pipeline":  # not followed, and so not read
            parts[position] = f"definition {dotted.rpartition('.')[2]}"
        elif package in (module.name.partition(".")[0], *PACKAGES) and (definition := _find(dotted)):
            names[dotted] = None
            parts[position] = f"definition {'.'.join(definition[1:]).strip('.')}"
    return FORMAT + sha256("\n".join(parts).encode()).hexdigest()[:12], tuple(names)


def _chain(node: ast.AST) -> str | None:
    """Return `name.attribute.attribute` as it is written; None for any other expression."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(attributes)]) if isinstance(node, ast.Name) else None


@cache
def _find(dotted: str) -> tuple[SourceModule, str, str] | None:
    """Return the module of a definition, its name there, and the attributes that follow it.

    None for a dotted name that is a module or unknown.
    """
    first, *rest = dotted.split(".")
    module = _source_module(first)
    for position, name in enumerate(rest):
        if module is None:
            return None
        if name in module.definitions:
            return module, name, ".".join(rest[position + 1 :])
        origin = module.imports.get(name)
        # A package passes on what another module defines. Of `from package.name import name`, the origin itself is a
        # name in the module, not an attribute of what it imports.
        in_module = rest[position + 1 :] and origin and origin.startswith(f"{module.name}.{name}.")
        if origin and origin != dotted and not in_module:
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
    definitions: dict[str, list[ast.stmt]] = defaultdict(list)
    imported: list[ast.Import | ast.ImportFrom] = []

    def collect(node: ast.AST, statement: ast.stmt) -> None:
        """Add what a node under a statement of the top level defines."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported.append(node)
        elif isinstance(node, DEFINITIONS):
            definitions[node.name].append(node)
        else:
            for bound in _bound_names(node):
                if statement not in definitions[bound]:
                    definitions[bound].append(statement)
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
                    collect(child, statement)

    for statement in body:
        collect(statement, statement)
    package = name if spec.submodule_search_locations else name.rpartition(".")[0]
    imports = _imports(imported, package)
    return SourceModule(name, name if spec.loader else Path(spec.origin).stem, package, dict(definitions), imports)


def _bound_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a statement sets or changes: `x = 1`, `x *= 2`, `x[0] = 1`, `x.append(1)`, `for x in y`."""
    targets: list[ast.AST] = []
    match node:
        case ast.Assign() | ast.Delete():
            targets += node.targets
        case ast.AnnAssign() | ast.AugAssign() | ast.For():
            targets.append(node.target)
        case ast.With():
            targets += [item.optional_vars for item in node.items if item.optional_vars]
        case ast.Expr(ast.Call(ast.Attribute() as method)):
            targets.append(method)
    for target in targets:  # grows while it is read
        if isinstance(target, ast.Name):
            yield target.id
        elif isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
        elif isinstance(target, ast.Attribute | ast.Subscript | ast.Starred):
            targets.append(target.value)


def _imports(nodes: Iterable[ast.Import | ast.ImportFrom], package: str) -> dict[str, str]:
    """Return the dotted name behind each name that the statements import."""
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names |= {item.asname or item.name: f"{origin}.{item.name}" for item in node.names if item.name != "*"}
        else:  # `import a.b` binds `a`, and `import a.b as c` binds `a.b`
            for item in node.names:
                first = item.name.partition(".")[0]
                names[item.asname or first] = item.name if item.asname else first
    return names
