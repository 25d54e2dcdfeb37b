"""`winnow sql` without a statement: statements from a terminal or a pipe, one after another on one catalog."""

import re
import sqlite3
import sys
from collections.abc import Callable
from contextlib import suppress

import pyarrow as pa
from rich.console import Console

from jobs import queries
from jobs.console import as_table
from jobs.output import interruptible
from pipeline.registry import nearest
from pipeline.sql.catalog import Answer, Catalog
from pipeline.sql.views import VIEWS
from schemas import TABLES, WinnowError

HELP = """A statement is one SELECT (also FROM, WITH, DESCRIBE, SUMMARIZE, SHOW TABLES), ended by a semicolon.
The name of a shipped query is that query. Ctrl-C cancels.
  .tables          tables, their rows, and what a row of each is
  .tables NAME     columns of one table, and what they mean
  .queries         shipped queries, and what they answer
  .help            this
  .quit            end (also Ctrl-D)"""


class Shell:
    """Errors end a statement and not the shell; `failed` counts them."""

    def __init__(self, catalog: Catalog, tell: Callable[[Answer], None], console: Console, complaints: Console) -> None:
        self.catalog, self.tell, self.console, self.complaints = catalog, tell, console, complaints
        self.interactive = sys.stdin.isatty()
        self.failed = 0

    def run(self) -> None:
        """Until .quit or the end of the input, whose last statement needs no semicolon."""
        if self.interactive:
            self._greet()
        text = ""
        while True:
            try:
                line = input(self._prompt(text))
            except EOFError:
                break
            except KeyboardInterrupt:
                text = self._cancelled()
                continue
            if not text and line.strip() == ".quit":
                return
            ready, text = split(f"{text}{line}\n")
            for each in ready:
                self.ask(each)
        if text:
            self.ask(text)

    def _greet(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401 - line editing and this session's history; none is kept

        runs, steps = len(self.catalog.runs), len(self.catalog.manifests)
        self.console.print(f"{self.catalog.root}: {runs} runs, {steps} steps; .help says what to do", highlight=False)

    def _prompt(self, text: str) -> str:
        return ("   ...> " if text else "winnow> ") if self.interactive else ""

    def _cancelled(self) -> str:
        """Nothing is left of what was typed; a pipe has nobody who would go on."""
        if not self.interactive:
            raise KeyboardInterrupt
        self.console.print("cancelled")
        return ""

    def ask(self, text: str) -> None:
        """One statement or command, with its answer or its error."""
        try:
            if text.lstrip().startswith("."):
                self._command(*text.split())
            else:
                statement = queries.statement(text)
                interruptible(self.catalog, lambda: self.tell(self.catalog.sql(statement)))
        except KeyboardInterrupt:
            self._cancelled()
        except WinnowError as error:
            self.failed += 1
            self.complaints.print("\n".join(error.problems), style="red", highlight=False, markup=False)

    def _command(self, name: str, *words: str) -> None:
        if name == ".help":
            self.console.print(HELP, highlight=False, markup=False)
        elif name == ".queries":
            self.console.print(as_table(shipped()))
        elif name == ".tables":
            self.console.print(as_table(_columns(words[0]) if words else _tables(self.catalog)))
        else:
            raise WinnowError(f"sql: no command {name}; .help lists them")


def split(text: str) -> tuple[list[str], str]:
    """Statements that are complete, and what is left; a command, or the name of a shipped query, is one by its line."""
    if text.lstrip().startswith(".") or text.strip() in queries.names():
        return [text], ""
    ready, begun = [], ""
    for piece in text.split(";")[:-1]:
        begun += piece + ";"
        if sqlite3.complete_statement(begun):  # knows quotes and comments as every SQL has them
            ready.append(begun)
            begun = ""
    rest = begun + text.rpartition(";")[2]
    return ready, rest if re.sub("--.*", "", rest).strip() else ""


def shipped() -> pa.Table:
    rows = [{"query": name, "answers": queries.about(name)} for name in queries.names()]
    return pa.Table.from_pylist(rows)


def _tables(catalog: Catalog) -> pa.Table:
    def counted(name: str) -> int:
        return sum(manifest["rows"].get(name, 0) for manifest in catalog.manifests)

    rows = {name: counted(name) for name in TABLES}
    rows |= {"runs": sum(len(steps) for steps in catalog.runs.values()), "steps": len(catalog.manifests)}
    told = [{"table": name, "rows": n, "about": _text(VIEWS[name].metadata[b"about"])} for name, n in rows.items()]
    return pa.Table.from_pylist(told)


def _columns(name: str) -> pa.Table:
    if name not in VIEWS:
        raise WinnowError(f"sql: no table {name!r}; {nearest(name, list(VIEWS))}")
    fields = [(field.name, str(field.type), _text(field.metadata[b"meaning"])) for field in VIEWS[name]]
    return pa.Table.from_pylist([dict(zip(("column", "type", "meaning"), field, strict=True)) for field in fields])


def _text(value: bytes) -> str:
    return value.decode()
