"""Winnow in Python, as in a notebook: `from jobs import winnow`. The commands `plan`, `run` and `sql` as functions.

Stages are functions of tables, too: `stages.selection.select.select(rewards, alone(folder), rule=...)`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import yaml

from jobs import queries, recipes
from jobs.commands.app import console, existing_store
from jobs.console import ProgressReporter
from jobs.models import find_model
from jobs.runs import with_free_names
from pipeline.config.estimates import as_rows, check_memory, step_costs
from pipeline.config.layers import rooted
from pipeline.config.partial import unfinished
from pipeline.config.plan import Plan
from pipeline.config.rounds import run_and_round
from pipeline.context import StageContext, WarmCache
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import groups_at_once, run_at_once
from pipeline.plugins import running_only
from pipeline.registry import nearest
from pipeline.sql.catalog import QueryResult, open_catalog
from pipeline.stage import signature_of, stages
from pipeline.store.store import Store
from schemas import TABLES, WinnowError, table_name

Config = str | Path | Mapping[str, Any]  # a YAML file, or what it would contain
Configs = Config | Sequence[Config]


class Results:
    """Finished steps of a store, of all runs, some, or one round. A statement reads what is finished by then."""

    def __init__(self, store: Store, runs: list[str] | None = None, round: int | None = None) -> None:
        self.store, self._runs, self._round = store, runs, round

    @property
    def runs(self) -> list[str]:
        """Return the names of the runs."""
        return sorted(self.store.runs()) if self._runs is None else self._runs

    def sql(self, statement: str) -> QueryResult:
        """Return the result of a SELECT or of a query by its name, with the methods `arrow()` and `pandas()`.

        `polars.from_arrow` and `datasets.Dataset` take the former. Raises WinnowError for any other statement: the
        store is read-only.
        """
        return open_catalog(self.store, self._runs, self._round).sql(queries.statement(statement))

    def table(self, run: str, step: str, name: str = "") -> pa.Table:
        """Return a table of a run's step as later stages read it: the step's first, or the one of this name.

        Raises WinnowError if there is none.
        """
        links = self.store.run(run)
        if step not in links:
            raise WinnowError(f"run {run!r} has no step {step!r}; {nearest(step, list(links))}")
        folder = self.store.at(links[step]["stage"], links[step]["key"])
        finished = (folder.manifest or {"rows": {}})["rows"]
        declared = stages.entries.get(links[step]["stage"])
        outputs = [table_name(schema) for schema in signature_of(declared).outputs] if declared else []
        names = [table for table in dict.fromkeys([*outputs, *finished]) if table in finished]
        if not names or (name and name not in names):
            raise WinnowError(f"{folder.path}: no finished table {name}; it has {', '.join(names)}")
        return folder.read(TABLES[name or names[0]])

    def model(self, run: str) -> Path:
        """Return the folder of a run's policy, `raft@1` that of a round; raise WinnowError if it is not finished."""
        return find_model(self.store, run).folder


def plan(
    recipe: str | Path, config: Configs = (), options: Mapping[str, Any] = {}, plugins: Sequence[str | Path] = ()
) -> Plan:
    """Return the checked plan of a recipe; nothing runs.

    recipe: a name of `winnow recipes`, or a YAML file. config: YAML files, or mappings in their place, whose relative
    paths begin with `./` and are those of the working directory. options: such as `{"select.rule.beta": 0.1}`, which
    outrank both. plugins: files of Python that may be executed, because a config may be somebody else's: those that it
    lists, and those of functions that an option names. Raises WinnowError with all mistakes.
    """
    return _plans([recipe], config, options, plugins)[0]


def costs(plan: Plan, store: str | Path = "store", profile: str | None = None) -> list[dict[str, Any]]:
    """Return what each step of a plan will take: rows, tokens or calls, memory by what it is for, seconds.

    Numbers come with what is known of them: `exactly`, `estimated`, `at most`; None is unknown. `winnow plan` prints
    them. profile: a name, or a file.
    """
    return as_rows(step_costs(plan, Store(str(store)), recipes.load_resources(profile), local=True))


def run(
    *recipe: str | Path,
    config: Configs = (),
    options: Mapping[str, Any] = {},
    store: str | Path = "store",
    executor: LocalExecutor | None = None,
    tags: Mapping[str, str] = {},
    plugins: Sequence[str | Path] = (),
) -> Results:
    """Run the steps that the recipes need and the store lacks; return the results of these runs.

    executor: `pipeline.execution.ray_executor.RayExecutor(workers, address, profile)` for a cluster; by default the
    work is done in this process. tags: what the runs are to be found by, with an empty value for a word. Otherwise as
    `plan`. Raises WinnowError for mistakes before anything runs, and where a step fails; what has finished is kept.
    """
    target, plans = Store(str(store)), _plans(recipe, config, options, plugins)
    with_free_names(plans, target)
    chosen = executor or LocalExecutor()
    steps = unfinished([step for item in plans for step in item.steps], target)
    check_memory(plans, steps, chosen.profile, local=getattr(chosen, "address", None) is None)
    with closing(ProgressReporter(console)) as reporter:
        for group in groups_at_once(plans, chosen):
            for item in group:
                item.tags = dict(tags)
            reporter.set_plans(group)
            run_at_once(group, target, chosen, reporter)
    return Results(target, [item.name for item in plans])


def open(store: str | Path = "store", run: str | None = None, round: int | None = None) -> Results:
    """Return the results of a store, in a folder or at a URL: of all runs, of one, or of one round (also `raft@2`).

    Raises WinnowError if there are no runs, or not this one.
    """
    source = existing_store(str(store))
    open_catalog(source, run, round)  # which checks both
    if run is not None:
        run, round = run_and_round(run, source.runs(), round)
    return Results(source, None if run is None else [run], round)


def alone(folder: str | Path) -> StageContext:
    """Return a context in which a stage can be called as a function; what it writes goes to `folder`.

    `context.rejects()` are the rows that it left out.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    return StageContext(Path(folder), WarmCache(), lambda *progress: None)


def _plans(
    names: Sequence[str | Path], config: Configs, options: Mapping[str, Any], plugins: Sequence[str | Path]
) -> list[Plan]:
    sets = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    configs = [config] if isinstance(config, str | Path | Mapping) else config
    with _as_files(configs) as files, running_only(map(Path, plugins)):
        return recipes.plans([str(name) for name in names], files, sets)


@contextmanager
def _as_files(configs: Sequence[Config]) -> Iterator[list[Path]]:
    """Yield a file for each config: a mapping becomes one, with the paths of the working directory."""
    with TemporaryDirectory() as folder:
        files = []
        for number, config in enumerate(configs, 1):
            if isinstance(config, Mapping):
                file = Path(folder) / f"config-{number}.yaml"
                file.write_text(yaml.safe_dump(rooted(dict(config), Path.cwd())), encoding="utf-8")
            else:
                file = Path(config)
            files.append(file)
        yield files
