"""Generated blocks of the READMEs, between `<!-- generated: NAME -->` and `<!-- end -->`.

`python -m tests.readmes --write` brings them up to date, and a test compares them. They are made in a process of
their own, in which no plugin is loaded.
"""

import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from jobs.__main__ import GROUPS
from jobs.reference import (
    file_page,
    first_line,
    function_page,
    recipe_table,
    registries,
    rows_as_markdown,
    stage_entries,
    stage_page,
)
from pipeline.sql.views import VIEWS

ROOT = Path(__file__).parents[1]


def recipes_markdown() -> str:
    """Return the table of recipes."""
    return rows_as_markdown([row | {"recipe": f"[`{row['recipe']}`]({row['recipe']}.yaml)",
                                  "objective": f"`{row['objective']}`"}
                           for row in recipe_table().to_pylist()])  # fmt: skip


def stages_markdown() -> str:
    """Return every stage of this package, then every function that an option can name, by kind."""
    entries = stage_entries()
    index = [{"stage": f"[`{entry.name}`](#{entry.name})", "about": first_line(entry)} for entry in entries]
    pages = [rows_as_markdown(index), *(f"##{stage_page(entry)}" for entry in entries)]
    for kind, registry in sorted(registries().items()):
        functions = [f"##{function_page(entry, kind)}" for _, entry in sorted(registry.entries.items())]
        functions += [f"##{file_page(registry)}"] if registry.plain else []
        pages += [f"## Functions: {kind}", *functions]
    return "\n\n".join(pages)


def schemas_markdown() -> str:
    """Return every table of SQL with every column: type, whether it may be null, meaning."""
    pages = []
    for name, schema in VIEWS.items():
        rows = [{"column": f"`{column.name}`", "type": str(column.type).replace("<", "\\<"),
                 "null": "yes" if column.nullable else "", "meaning": column.metadata[b"meaning"].decode()}
                for column in schema]  # fmt: skip
        pages.append(f"### {name}\n\n{schema.metadata[b'about'].decode()}\n\n{rows_as_markdown(rows)}")
    return "\n\n".join(pages)


def commands_markdown() -> str:
    """Return the commands of `winnow` by group, in the order of `winnow --help`."""
    rows = [{"": group if n == 0 else "", "command": f"`winnow {command.__name__}`",
             "what it does": inspect.cleandoc(command.__doc__ or "").partition("\n")[0]}
            for group, commands in GROUPS.items() for n, command in enumerate(commands)]  # fmt: skip
    return rows_as_markdown(rows)


def execution_markdown() -> str:
    """Return the options that are not part of a key, by stage or function, then entries of options that are not."""
    functions = [(kind, entry) for kind, registry in registries().items() for entry in registry.entries.values()]
    rows, lists = [], {}
    for kind, entry in [*(("stage", entry) for entry in stage_entries()), *functions]:
        if names := [f"`{name}`" for name in entry.options.model_fields if name in entry.execution]:
            rows.append({"stage or function": f"{kind} `{entry.name}`", "outside its key": ", ".join(names)})
        for name, marked in entry.execution_entries.items():
            entries = textwrap.fill(", ".join(f"`{item}`" for item in sorted(marked)), 120, break_on_hyphens=False)
            lists[name] = f"Of the entries of `{name}`:\n\n{entries}"
    return "\n\n".join([rows_as_markdown(rows), *lists.values()])


README_BLOCKS: dict[str, tuple[str, Callable[[], str]]] = {  # name of a block -> README, and what generates the block
    "execution": ("pipeline/README.md", execution_markdown),
    "commands": ("jobs/README.md", commands_markdown),
    "recipes": ("jobs/recipes/README.md", recipes_markdown),
    "stages": ("stages/README.md", stages_markdown),
    "schemas": ("schemas/README.md", schemas_markdown),
}


def main() -> None:
    """Write the blocks with `--write`; without, print the READMEs whose blocks are not up to date, and exit with 1."""
    stale = []
    for name, (readme, generate) in README_BLOCKS.items():
        path, begin, end = ROOT / readme, f"<!-- generated: {name} -->", "<!-- end -->"
        text = path.read_text(encoding="utf-8")
        head, rest = text.split(begin)
        block = f"{head}{begin}\n\n{generate()}\n\n{end}{rest.partition(end)[2]}"
        if sys.argv[1:] == ["--write"]:
            path.write_text(block, encoding="utf-8")
        elif block != text:
            stale.append(readme)
    if stale:
        sys.exit(f"not up to date: {', '.join(stale)}; `python -m tests.readmes --write` writes them")


if __name__ == "__main__":
    main()
