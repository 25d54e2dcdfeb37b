"""Shell of `winnow sql`: statements from a terminal or a pipe, one after another on one catalog."""

import re
import sys
from collections.abc import Callable, Iterator

import duckdb
import pyarrow as pa
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from rich.console import Console

from jobs import queries
from jobs.console import as_table
from jobs.output import interruptible
from pipeline.registry import nearest
from pipeline.sql.catalog import Catalog, QueryResult
from pipeline.sql.views import VIEWS
from pipeline.store.storage import cache
from schemas import COMMAND, TABLES, WinnowError

COMMANDS = (".tables", ".queries", ".help", ".quit")
QUIT = re.compile(r"\s*\.?(quit|exit|q)\s*;?\s*", re.IGNORECASE)
KEYWORDS = (
    "SELECT DISTINCT FROM WHERE GROUP ORDER BY HAVING LIMIT JOIN LEFT USING ON AS AND OR NOT IN IS NULL LIKE BETWEEN "
    "CASE WHEN THEN ELSE END WITH UNION ALL OVER PARTITION QUALIFY UNNEST COUNT SUM AVG MIN MAX MEDIAN QUANTILE_CONT "
    "DESC ASC DESCRIBE SUMMARIZE SHOW TABLES"
)
HELP = """A statement is one SELECT (also FROM, WITH, DESCRIBE, SUMMARIZE, SHOW TABLES), ended by a semicolon.
The name of a shipped query runs that query. Tab completes, Ctrl-C cancels.
  .tables          tables, their rows, and what one row is
  .tables NAME     columns of one table, and what they mean
  .queries         shipped queries, and what they answer
  .help            this text
  .quit            end (also quit, exit, Ctrl-D)"""


class Shell:
    """Loop over statements and commands. An error ends the statement, not the shell; `errors` counts them."""

    def __init__(
        self,
        catalog: Catalog,
        show: Callable[[QueryResult], None],
        console: Console,
        error_console: Console,
        timeout: float | None = None,
    ) -> None:
        self.catalog, self.show, self.console, self.error_console = catalog, show, console, error_console
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()  # else prompts would be in the output
        self.errors = 0
        self.timeout = timeout  # of a statement, in seconds

    def run(self) -> None:
        """Read until .quit or the end of the input, whose last statement needs no semicolon."""
        for text in self._typed() if self.interactive else self._piped():
            if QUIT.fullmatch(text):
                return
            self.execute(text)

    def _typed(self) -> Iterator[str]:
        """Yield complete statements from a terminal, with completion and a history that is kept between sessions."""
        file = cache() / "sql_history"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            history: History = FileHistory(str(file))
        except OSError:  # a home that cannot be written to: the shell works without it
            history = InMemoryHistory()
        session: PromptSession[str] = PromptSession(
            f"{COMMAND}> ",
            history=history,
            completer=WordCompleter(completions(), ignore_case=True, pattern=re.compile(r"\.?\w+")),
            complete_while_typing=False,
            # Enter ends the input once nothing is left over, and else begins a line.
            multiline=Condition(lambda: bool(split(session.default_buffer.text + "\n")[1])),
            prompt_continuation="   ...> ",
        )
        runs, steps = len(self.catalog.runs), len(self.catalog.manifests)
        self.console.print(
            f"{self.catalog.root}: {runs} runs, {steps} steps; .help lists commands", highlight=False, markup=False
        )
        while True:
            try:
                text = session.prompt()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print("cancelled")
                continue
            yield from split(text + "\n")[0]

    def _piped(self) -> Iterator[str]:
        text = ""
        for number, content in enumerate(sys.stdin.buffer, 1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise WinnowError(f"sql: line {number} of the input is not UTF-8: {error}") from None
            ready, text = split(text + line.rstrip("\r\n") + "\n")
            yield from ready
        if text:
            yield text

    def execute(self, text: str) -> None:
        """Print the result, or the error, of one statement or command."""
        try:
            if text.lstrip().startswith("."):
                self._run_command(*text.rstrip().removesuffix(";").split())
            else:
                statement = queries.statement(text)
                interruptible(self.catalog, lambda: self.show(self.catalog.sql(statement)), self.timeout)
        except KeyboardInterrupt:
            if not self.interactive:  # nobody at a pipe would continue
                raise
            self.console.print("cancelled")
        except WinnowError as error:
            self.errors += 1
            self.error_console.print("\n".join(error.problems), style="red", highlight=False, markup=False)

    def _run_command(self, name: str, *words: str) -> None:
        if name == ".help":
            self.console.print(HELP, highlight=False, markup=False)
        elif name == ".queries":
            self.console.print(as_table(queries.table()))
        elif name == ".tables" and words:
            if words[0] not in VIEWS:
                raise WinnowError(f"sql: no table {words[0]!r}; {nearest(words[0], list(VIEWS))}")
            columns = [{"column": item.name, "type": str(item.type), "meaning": item.metadata[b"meaning"].decode()}
                       for item in VIEWS[words[0]]]  # fmt: skip
            self.console.print(as_table(pa.Table.from_pylist(columns)))
        elif name == ".tables":
            runs, manifests = self.catalog.runs, self.catalog.manifests
            counts = {table: sum(manifest["rows"].get(table, 0) for manifest in manifests) for table in TABLES}
            counts |= {"runs": sum(len(steps) for steps in runs.values()), "steps": len(manifests)}
            tables = [{"table": table, "rows": count, "about": VIEWS[table].metadata[b"about"].decode()}
                      for table, count in counts.items()]  # fmt: skip
            self.console.print(as_table(pa.Table.from_pylist(tables)))
        else:
            raise WinnowError(f"sql: no command {name}; .help lists them")


def completions() -> list[str]:
    """Return what Tab completes: dot commands, tables, their columns, shipped queries, SQL keywords."""
    columns = {column.name for schema in VIEWS.values() for column in schema}
    return [*COMMANDS, *sorted({*VIEWS, *columns, *queries.names()}), *KEYWORDS.split()]


def split(text: str) -> tuple[list[str], str]:
    """Return the complete statements, and the rest; a command, or a shipped query's name, is complete by its line.

    A semicolon ends a statement where DuckDB reads it as one, not in quotes, dollar quotes or comments.
    """
    if text.lstrip().startswith(".") or text.strip() in queries.names() or QUIT.fullmatch(text):
        return [text], ""
    encoded, start, ready = text.encode(), 0, []
    for position, _ in duckdb.tokenize(text):  # positions in bytes
        if encoded[position : position + 1] == b";":
            ready.append(encoded[start : position + 1].decode())
            start = position + 1
    rest = encoded[start:].decode()
    *kinds, last = (kind for _, kind in duckdb.tokenize(f"{rest}\n;"))
    is_nothing = last is duckdb.token_type.operator and all(kind is duckdb.token_type.comment for kind in kinds)
    return ready, "" if is_nothing else rest
