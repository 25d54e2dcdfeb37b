"""Plugins: functions of users, registered before a recipe is checked.

A recipe or config lists files under `plugins`; an installed package names a module by an entry point in the group
`winnow.plugins`. The digest of the file is part of the key of each step that uses one of its functions, so an edit
computes those steps again. A plugin registers functions that it defines itself; what it imports is not followed, and
must be installed: a plugin is one file, because a worker gets its text and nothing beside it.

A file is code. A command runs only those that it names itself (`--plugin`, in Python `plugins`), because a config may
be somebody else's. A file that a command names is a plugin of its recipes, listed there or not.
"""

import linecache
import shlex
import sys
import tokenize
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import module_from_spec
from pathlib import Path

from pipeline.registry import Plugin, describe, loading, plugin_packages
from schemas import WinnowError

GROUP = "winnow.plugins"
_plugins: dict[str, Plugin] = {}  # digest -> loaded plugin
_named: ContextVar[tuple[Path, ...] | None] = ContextVar("named", default=None)  # files that may run; None for all


@contextmanager
def running_only(files: Iterable[Path]) -> Iterator[None]:
    """Let no other file of Python be executed inside, as a plugin or for a function in it."""
    token = _named.set(tuple(file.expanduser().resolve() for file in files))
    try:
        yield
    finally:
        _named.reset(token)


def with_named(files: Iterable[Path]) -> list[Path]:
    """Return the files of plugins that a config or recipe lists, then those that the command names beside them."""
    listed = list(files)
    resolved = {file.resolve() for file in listed}
    return [*listed, *(file for file in dict.fromkeys(_named.get() or ()) if file not in resolved)]


def load_plugins(files: Iterable[Path]) -> list[Path]:
    """Load the installed plugins, then the files, each content once, and return the paths of the files.

    Raise WinnowError for all files that cannot be read or executed, or that register a name which is taken.
    """
    paths, problems = [], []
    _load_installed()
    for file in files:
        path = file.absolute()
        try:
            load_file(path)
            paths.append(path)
        except WinnowError as error:
            problems += [item if item.startswith("plugin ") else f"plugins: {item}" for item in error.problems]
    if problems:
        raise WinnowError(*problems)
    return paths


def load_file(path: Path) -> Plugin:
    """Execute a file of a user and return it as a plugin.

    Raise WinnowError if it cannot be read or executed, or is not among those that the command names.
    """
    named = _named.get()
    if named is not None and path.resolve() not in named:
        raise WinnowError(
            f"{path} is Python code, and what a config or recipe names is not run unless the command names it too: "
            f"read it, then add `--plugin {shlex.quote(str(path))}` (in Python, `plugins=[{str(path)!r}]`)"
        )
    try:
        if path.exists() and not path.is_file():
            raise WinnowError(f"{path} is no file of Python")
        with tokenize.open(path) as file_text:  # in the encoding that the file declares, as Python reads it
            source = file_text.read()
    except FileNotFoundError:
        raise WinnowError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise WinnowError(f"{path} cannot be read ({error})") from None
    return load_source(path, source)


def load_source(path: Path, source: str) -> Plugin:
    """Execute a plugin's source and return the plugin with what it registers, or the one loaded before.

    The module is named by its content, so that two files of one name do not collide and a pickle that refers to it
    means this content. A worker calls this with the source that the driver sent. An older content of the same path
    is forgotten first. Raise WinnowError, with nothing registered, where the execution fails.
    """
    plugin = Plugin(path, source)
    if plugin.digest in _plugins:
        return _plugins[plugin.digest]
    for old in [old for old in _plugins.values() if old.path == path]:
        _forget(old)
    module = module_from_spec(ModuleSpec(plugin.module, None, origin=str(path)))
    module.__file__ = str(path)
    # Tracebacks and inspect read this: the file may have changed since, and a worker may not have it.
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    sys.modules[module.__name__] = module  # before it is executed: dataclasses look their module up
    token = loading.set(plugin)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        _forget(plugin)
        del sys.modules[module.__name__]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        where = f"plugin {path}, line {lines[-1]}" if lines else f"plugin {path}"
        raise WinnowError(f"{where}: {describe(error)}{_one_file_hint(path, error)}") from error
    finally:
        loading.reset(token)
    _plugins[plugin.digest] = plugin
    return plugin


def _one_file_hint(path: Path, error: BaseException) -> str:
    """Return what to do where a plugin imports a file beside it."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    is_beside = name and any((path.parent / file).exists() for file in (f"{name}.py", name))
    if not is_beside and "relative import" not in str(error):
        return ""
    return (
        f"; a plugin is one file, and cannot import those beside it: write their functions into {path.name}, or "
        f"install them as a package, whose entry point in the group {GROUP} can register them"
    )


def unload_plugins() -> None:
    """Remove the functions of all plugin files, for a notebook or a test whose next recipe uses their names."""
    for plugin in list(_plugins.values()):
        _forget(plugin)


def _forget(plugin: Plugin) -> None:
    _plugins.pop(plugin.digest, None)
    for registry, entry in plugin.registered:
        registry.forget(entry)


@cache  # once per process: scanning the installed packages takes tens of milliseconds
def _load_installed() -> None:
    for point in entry_points(group=GROUP):
        plugin = Plugin(Path(point.module), "", package=point.module.partition(".")[0])
        token = loading.set(plugin)
        try:
            point.load()
        except (Exception, SystemExit) as error:
            _forget(plugin)
            package = point.dist.name if point.dist else point.module
            raise WinnowError(
                f"plugin {point.name!r} of the installed package {package}: {type(error).__name__}: {error}; "
                "correct or uninstall it"
            ) from error
        finally:
            loading.reset(token)
        plugin_packages.add(plugin.package)
