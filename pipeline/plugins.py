"""Plugins: functions of users, registered before a recipe is checked.

A recipe or config lists files under `plugins`; an installed package names a module by an entry point in the group
`winnow.plugins`. The digest of the file is part of the key of each step that uses one of its functions, so an edit
computes those steps again. A plugin registers functions that it defines itself; what it imports is not followed, and
must be installed.
"""

import linecache
import sys
import traceback
from collections.abc import Iterable
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import module_from_spec
from pathlib import Path

from pipeline.registry import Plugin, loading, plugin_packages
from schemas import WinnowError

GROUP = "winnow.plugins"
_plugins: dict[str, Plugin] = {}  # digest -> loaded plugin


def load_plugins(files: Iterable[Path]) -> list[Path]:
    """Load the installed plugins, then the files, each content once, and return the paths of the files.

    Raise WinnowError for all files that cannot be read or executed, or that register a name which is taken.
    """
    paths, problems = [], []
    _load_installed()
    for file in files:
        path = file.absolute()
        try:
            load_source(path, path.read_text(encoding="utf-8"))
            paths.append(path)
        except FileNotFoundError:
            problems.append(f"plugins: no such file: {path}")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"plugins: {path} cannot be read ({error})")
        except WinnowError as error:
            problems += error.problems
    if problems:
        raise WinnowError(*problems)
    return paths


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
        raise WinnowError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    finally:
        loading.reset(token)
    _plugins[plugin.digest] = plugin
    return plugin


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
