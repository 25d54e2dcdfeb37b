"""Plans: a recipe's steps with keys, inputs before consumers. All mistakes of a recipe are found here, at once."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from string import Template
from typing import Any

from pipeline.config.code import FORMAT, code_digests
from pipeline.config.keys import canonical, key_of
from pipeline.config.layers import Origin
from pipeline.config.precision import mixed_precision, with_dtype
from pipeline.config.recipe import Recipe, how_to_set, option_paths
from pipeline.config.rounds import split_round, unknown_step_hint
from pipeline.plugins import load_plugins
from pipeline.registry import ELSEWHERE, FORMER, FROM_FILE, Bound, Entry, bound_entries, nearest, registry_of
from pipeline.stage import InputStep, StageSignature, signature_of, stages
from pipeline.store.fingerprints import MISSING
from schemas import COMMAND, WinnowError, WinnowWarning, table_name

FURTHER = "evaluate_"  # begins the name of each evaluation beside the main one, in queries (jobs/queries) too


class StepsWarning(WinnowWarning):
    """Warning of a check, with the steps of a plan that it concerns."""

    def __init__(self, steps: list[str], text: str) -> None:
        super().__init__(f"{', '.join(steps)}: {text}")
        self.steps, self.text = steps, text


@contextmanager
def merged_warnings() -> Iterator[None]:
    """Show a warning of several plans once, with the steps of all of them: plans of one config have many in common."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        steps: dict[str, dict[str, None]] = {}
        for item in caught:
            if isinstance(item.message, StepsWarning):
                steps.setdefault(item.message.text, {}).update(dict.fromkeys(item.message.steps))
        for item in caught:
            if not isinstance(item.message, StepsWarning):
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
            elif names := steps.pop(item.message.text, None):
                warnings.warn(StepsWarning(list(names), item.message.text), stacklevel=2)


@dataclass(eq=False)
class Step:
    """Stage with its options and inputs; its key says where the result is stored."""

    name: str
    entry: Entry
    options: dict[str, Any]
    inputs: dict[str, "Step"]
    shards: int  # parts of its tables, unless its result has another number; not part of the key
    origins: dict[str, Origin] = field(default_factory=dict)  # of its options, by dotted path; not part of the key
    takes_earlier_rows: bool = True  # if its stage can; not where it is forced to compute all of them again

    @property
    def signature(self) -> StageSignature:
        return signature_of(self.entry)

    @property
    def stage(self) -> str:
        return self.entry.name

    @cached_property
    def functions(self) -> list[Entry]:
        """Return the stage and every registered function in the options that decide the result."""
        return [self.entry, *bound_entries(self.entry.identity_of(self.options))]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return everything that decides the result, and nothing else.

        The content of a plugin file is part of it: who edits their own function cannot be asked to raise a version.
        """
        identity = {
            "stage": self.entry.name,
            "version": self.signature.version,
            "options": canonical(self.entry.identity_of(self.options)),
            "inputs": {name: step.key for name, step in self.inputs.items()},
        }
        plugins = {f"{entry.kind} {entry.name}": entry.plugin_digest for entry in self.functions}
        plugins = {name: digest for name, digest in plugins.items() if digest}
        return identity | ({"plugins": plugins} if plugins else {})

    @cached_property
    def key(self) -> str:
        return key_of(self.identity)

    @cached_property
    def row_key(self) -> str:
        """Return the hash of what decides the content of its rows, whichever of them there are.

        Steps of one row key have equal rows for one prompt (and draw): with another n, or prompts of a longer file.
        """
        which_rows = self.signature.which_rows
        if not which_rows:
            return self.key
        options = {name: value for name, value in self.identity["options"].items() if name not in which_rows}
        inputs = {name: step.row_key for name, step in self.inputs.items()}
        return key_of(self.identity | {"options": options, "inputs": inputs})

    @cached_property
    def code(self) -> dict[str, str]:
        """Return a short digest of the source of each registered function of the step, and of all that these use.

        By name, and by `module.name` (pipeline/config/code.py). It is not part of the key: most changes of code change
        no result. A different digest is a reason to look at the version.
        """
        digests: dict[str, set[str]] = {}  # a stage and a rule may share a name
        for entry in self.functions:
            for name, digest in code_digests(entry.fn).items():
                digests.setdefault(name, set()).add(digest)
        return {name: " ".join(sorted(same_name)) for name, same_name in digests.items()}


def stale_code(step: Step, manifest: Mapping[str, Any]) -> list[str]:
    """Return a line for each function of a finished step whose source, or what it uses, has changed since then.

    A manifest from before `code`, from before that held what a function uses, or with digests of another format says
    nothing about it. What only moved to another module has not changed.
    """
    recorded: dict[str, str] = manifest.get("code") or {}
    before = {name: digest for name, digest in recorded.items() if digest.startswith(FORMAT)}
    changed = {name for name, digest in step.code.items() if before.get(name, digest) != digest}
    gone = Counter(before[name] for name in before.keys() - step.code.keys())
    if any("." in name for name in before):
        came = Counter(step.code[name] for name in step.code.keys() - before.keys())
        changed |= {name for name in step.code.keys() - before.keys() if (came - gone)[step.code[name]]}
        if not changed:  # a name now stands for another definition, which the step uses elsewhere too
            changed |= {name for name in before.keys() - step.code.keys() if (gone - came)[before[name]]}
    lines = []
    for entry in step.functions:
        digested = code_digests(entry.fn).keys() | (before.keys() - step.code.keys() if entry is step.entry else set())
        uses = ", ".join(sorted(changed & digested - {entry.name}))
        if uses or entry.name in changed:
            what = f"`{entry.name}`" if entry.name in changed else f"what `{entry.name}` uses"
            lines.append(
                f"{step.name}: {what} has changed{f' ({uses})' if uses else ''} since this result was computed, and "
                f"its version is still {entry.version}; raise its version, or recompute this result with "
                f"`--force {step.name}`; if the change does not alter it, raise the version and keep it with "
                f"`{COMMAND} adopt`"
            )
    return list(dict.fromkeys(lines))


@dataclass
class Plan:
    """Steps that a recipe's targets need, in an order in which they can run, and the target of each round."""

    name: str
    steps: list[Step] = field(default_factory=list)
    targets: list[Step] = field(default_factory=list)
    evaluations: list[Step] = field(default_factory=list)  # beside the targets
    part: list[Step] | None = None  # the steps to run, if not all; what else they read is finished
    plugins: list[Path] = field(default_factory=list)  # files that must be shipped with the recipe
    notes: list[str] = field(default_factory=list)  # what users should know of it, and need not act on
    left_out: list[str] = field(default_factory=list)  # what the recipe would do and the plan does not, and why
    tags: dict[str, str] = field(default_factory=dict)  # of the run; no part of a key
    command: list[str] = field(default_factory=list)  # words that it was called with, without the program

    @property
    def steps_to_run(self) -> list[Step]:
        """Return the steps to run, finished ones included."""
        return self.steps if self.part is None else self.part

    @property
    def target(self) -> Step:
        """Return the target of the last round."""
        return self.targets[-1]


def reads_files(entry: Entry | None) -> bool:
    """Return whether a stage reads no table. Such steps run first: errors in the data are reported before training."""
    return entry is not None and all(item.schema is None for item in signature_of(entry).inputs)


def make_plan(recipe: Recipe, last: str | None = None) -> Plan:
    """Return the checked plan of a recipe. Raise WinnowError with all mistakes in its names, types, inputs and options.

    If a plugin cannot be loaded, that is the only mistake reported: most others would follow from it. What the checks
    of stages warn of is said once for all steps that it concerns. last: the step that a command ends with, behind which
    it concerns none.
    """
    plan = Plan(recipe.name, plugins=load_plugins(recipe.plugins))
    problems: list[str] = []
    recipe = with_dtype(_with_choices(_with_functions(recipe, problems)))

    # Names: every step's stage, the steps that it reads, the targets.
    entries: dict[str, Entry] = {}
    sources: dict[str, dict[str, str]] = {}
    for name, body in recipe.steps.items():
        try:
            entries[name] = stages.find(body.get("use", name))
        except WinnowError as error:
            problems += [f"{name}.use: {problem}" for problem in error.problems]
        sources[name] = {}
        for item, source in (body.get("from") or {}).items():
            if source in recipe.steps:
                sources[name][item] = source
            elif source is not None:
                hint = unknown_step_hint(source, recipe.step_names, recipe.rounds)
                problems.append(f"{name}.from.{item}: no step {source!r} in this recipe; {hint}")
    targets, evaluations = recipe.targets, recipe.further_targets
    for setting, names in (("target", targets), ("evaluations", evaluations)):
        for name in [name for name in names if name not in recipe.steps]:
            hint = unknown_step_hint(name, recipe.step_names, recipe.rounds)
            problems.append(f"{setting}: no step {name!r} in this recipe; {hint}")
            names.remove(name)
    for name in dict.fromkeys(split_round(name)[0] for name in evaluations):
        if not name.startswith(FURTHER):
            problems.append(
                f"evaluations: the name of step {name!r} must begin with {FURTHER}, by which the leaderboard tells "
                f"it from the main evaluation; call it {FURTHER}{name}"
            )

    # Without what only the evaluation reads, the run ends with what is trained.
    if recipe.trained in recipe.step_names and not problems:
        trained = recipe.in_rounds(recipe.trained)
        all_steps, training = (_inputs_first(names, sources, []) for names in (targets, trained))
        lacking = [
            name
            for name in all_steps
            if "path" in entries[name].options.model_fields
            and not any((recipe.steps[name].get("with") or {}).get(option) for option in ("path", "dataset"))
        ]
        if lacking and set(trained) <= set(all_steps) and not set(lacking) & set(training):
            paths = " and ".join(f"{name}.path" for name in lacking)
            plan.left_out = [
                f"{recipe.target} is left out, and the run ends with {recipe.trained}: {paths} "
                f"{'are' if len(lacking) > 1 else 'is'} not given; name them in a config for a leaderboard"
            ]
            targets, evaluations = trained, []

    # Order: what reads files first, then each round's target with all that it needs.
    needed = _inputs_first([*targets, *evaluations], sources, problems)
    first = [name for name in needed if reads_files(entries.get(name))]
    order = _inputs_first([*first, *targets, *evaluations], sources, problems)

    # Options, then each step against its stage. What an unneeded step lacks, a file too, does not matter; a wrong value
    # does.
    options: dict[str, dict[str, Any]] = {}
    wrong: dict[str, list[str]] = {}  # what is wrong with a step's options
    misplaced: dict[tuple[str, str], list[str]] = {}  # steps by an option that is none of theirs, and where it is one
    for name, entry in entries.items():
        fields, step_options = entry.options.model_fields, recipe.steps[name].get("with") or {}
        hints = {
            option: how_to_set(option, value, recipe.steps)
            for option, value in step_options.items()
            # Of this step's own options, and of its functions', the message of the stage names the right one.
            if not fields.keys() & {option, FORMER.get(option), ELSEWHERE.get(option)}
            and not any(path.startswith(f"{name}.") for path in option_paths(option, recipe.steps))
        }
        for option, hint in hints.items():
            if hint:
                misplaced.setdefault((option, hint), []).append(name)
        try:
            defaults = {"track": recipe.track} if recipe.track and "track" in fields else {}
            of_stage = {option: value for option, value in step_options.items() if not hints.get(option)}
            options[name] = entry.validate(defaults | of_stage, name)
        except WinnowError as error:
            lacks = (": required", MISSING)
            wrong[name] = [
                text for text in error.problems if name in order or not any(words in text for words in lacks)
            ]
    used = {source for sources_of_step in sources.values() for source in sources_of_step.values()}.union(order)
    unused = [name for name in entries if name not in used]
    for name, lines in wrong.items():
        # A user may have given a step another name than the recipe.
        alike = [other for other in unused if entries[other].name == entries[name].name and other != name]
        for n, line in enumerate(lines):
            option, is_required, _ = line.removeprefix(f"{name}.").partition(": required")
            meant = [other for other in alike if option in (recipe.steps[other].get("with") or {})]
            if is_required and meant:
                lines[n] += (
                    f"; step {meant[0]} sets `{option}`, and nothing reads that step: call it {name} if it is meant"
                )
    problems += _where_written(wrong, recipe.likes)
    for (option, hint), names in misplaced.items():
        bases = _base_names(names)
        locations = [f"{name}.{option}" for name in bases if not _inherits(name, bases, recipe.likes)]
        more = f" and {len(locations) - 3} more" if len(locations) > 3 else ""
        problems.append(f"{', '.join(locations[:3])}{more}: unknown option{hint}")
    for name in order:
        if name in entries:
            problems += _input_problems(name, entries, sources[name], options)
    problems += _origin_problems(order, entries, sources, options)
    problems_of_checks, warnings_of_checks = _check_stages(order, entries, sources, options)
    problems += [f"{', '.join(_base_names(names))}: {text}" for text, names in problems_of_checks.items()]
    ends = [name for name in recipe.in_rounds(last) if name in sources] if last else []
    to_run = _inputs_first(ends, sources, []) if ends else order
    for text, names in warnings_of_checks.items():
        if concerned := [name for name in names if name in to_run]:
            warnings.warn(StepsWarning(_base_names(concerned), text), stacklevel=2)
    if recipe.rounds > 1 and order and not any("@" in name for name in order):
        problems.append(
            f"rounds: all {recipe.rounds} are the same, for nothing that {recipe.target!r} needs changes between them; "
            "write an input as `from: {policy: {first: sft, then: optimize}}`, or an overlay for each round"
        )
    if problems:
        raise WinnowError(*_without_rounds(problems))

    steps: dict[str, Step] = {}
    for name in order:
        inputs_of_step = {item: steps[source] for item, source in sources[name].items()}
        origins = recipe.origins.get(name, {})
        steps[name] = Step(name, entries[name], options[name], inputs_of_step, recipe.shards, origins)
    plan.steps = list(steps.values())
    plan.targets = [steps[name] for name in targets]
    plan.evaluations = [steps[name] for name in evaluations]
    plan.notes = [note for note in recipe.notes if note.partition(".")[0] in {split_round(name)[0] for name in order}]
    plan.notes += _other_meanings(recipe, plan.steps)
    plan.notes += _unread_pairs(plan.steps)
    plan.notes += mixed_precision({step.name: (step.options, step.origins) for step in plan.steps})
    return plan


def _unread_pairs(steps: list[Step]) -> list[str]:
    """Return a note for each step that holds out pairs which no step of the plan trains on or measures."""
    notes = []
    for step in steps:
        share = step.options.get("heldout")
        if not share or "pairs" not in map(table_name, step.signature.outputs):
            continue
        readers = [reader for reader in steps if step in reader.inputs.values()]
        if readers and all(reader.options.get("split") in (None, "train") for reader in readers):
            notes.append(
                f"{step.name}.heldout: the pairs of {share:.0%} of its prompts are held out, and no step trains on "
                f"them or measures them; `{step.name}: {{with: {{heldout: 0.0}}}}` trains on all"
            )
    return notes


def _with_functions(recipe: Recipe, problems: list[str]) -> Recipe:
    """Return the recipe with a function in place of each input whose step uses one: `ranker: {use: pattern}`.

    A step for which no stage is registered, and that every reader can be given by an option, is no step but the
    function that this option names.
    """
    steps, origins = dict(recipe.steps), dict(recipe.origins)
    for source, source_body in recipe.steps.items():
        use = source_body.get("use", source)
        readers = [
            (name, item, signature_of(stages.entries[body.get("use", name)]).given_by[item])
            for name, body in recipe.steps.items()
            if body.get("use", name) in stages.entries
            for item, read in (body.get("from") or {}).items()
            if read == source and item in signature_of(stages.entries[body.get("use", name)]).given_by
        ]
        if use in stages.entries or not readers:
            continue
        try:
            for name, _, option in readers:
                registry = registry_of(stages.entries[steps[name].get("use", name)].options.model_fields[option])
                assert registry is not None, f"{name}.{option} names a function, as its stage's `given_by` says"
                if not (registry.plain and use == FROM_FILE):
                    registry.find(use)
        except WinnowError as error:
            problems += [f"{source}.use: {problem}" for problem in error.problems]
            continue
        for name, item, option in readers:
            body = steps[name]
            options = body.get("with") or {}
            if option in options:
                problems.append(
                    f"{name}.{option}: {options[option]!r}, and {source!r} is the function {use}; set one of them"
                )
                continue
            function = {"name": use, **(source_body.get("with") or {})}
            inputs = {key: read for key, read in body["from"].items() if key != item}
            steps[name] = body | {"from": inputs, "with": options | {option: function}}
            moved = {f"{option}.{path}": origin for path, origin in origins.get(source, {}).items()}
            origins[name] = origins.get(name, {}) | moved
        del steps[source]
    return replace(recipe, steps=steps, origins=origins)


def _with_choices(recipe: Recipe) -> Recipe:
    """Return the recipe with the options that stages choose by what their inputs are, where nobody has set them."""
    seen: dict[str, InputStep] = {}

    def input_step(name: str) -> InputStep:
        if name not in seen:
            seen[name] = InputStep("")  # a cycle of steps is reported later, and so are wrong names and options
            body = recipe.steps[name]
            with suppress(WinnowError):
                entry = stages.find(body.get("use", name))
                seen[name] = InputStep(entry.name, entry.validate(body.get("with") or {}, name), inputs_of(body))
        return seen[name]

    def inputs_of(body: dict[str, Any]) -> dict[str, InputStep]:
        sources = (body.get("from") or {}).items()
        return {item: input_step(source) for item, source in sources if source in recipe.steps}

    steps = dict(recipe.steps)
    for name, body in recipe.steps.items():
        with suppress(WinnowError):
            options = body.get("with") or {}
            chosen = signature_of(stages.find(body.get("use", name))).choose(inputs_of(body))
            if added := {option: value for option, value in chosen.items() if option not in options}:
                steps[name] = body | {"with": options | added}
    return replace(recipe, steps=steps)


def _other_meanings(recipe: Recipe, steps: list[Step]) -> list[str]:
    """Return a line for each function whose name, as a user wrote it, means another one in another library."""
    lines = []
    for step in steps:
        written: dict[str, Any] = recipe.steps[step.name].get("with") or {}
        for option, value in step.options.items():
            name = written.get(option)
            name, path = (name.get("name"), f"{option}.name") if isinstance(name, dict) else (name, option)
            is_own = path in step.origins and step.origins[path].by_user
            if isinstance(value, Bound) and is_own and name in value.metadata.get("elsewhere", {}):
                lines.append(f"{step.name}.{option}: {name}: {value.metadata['elsewhere'][name]}")
    return _without_rounds(lines)


def _inputs_first(targets: list[str], sources: dict[str, dict[str, str]], problems: list[str]) -> list[str]:
    """Return the targets and all that they need, depth first: a round is finished before the next one begins.

    graphlib would sort by levels, which mixes the rounds. A cycle is a problem that names its members.
    """
    order: list[str] = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            problems.append(f"{name}.from: a cycle: {' -> '.join([*trail[trail.index(name) :], name])}")
        elif name not in order:
            for source in sources[name].values():
                visit(source, (*trail, name))
            order.append(name)

    for target in targets:
        visit(target, ())
    return order


def _input_problems(
    name: str, entries: dict[str, Entry], sources: dict[str, str], options: dict[str, dict[str, Any]]
) -> list[str]:
    """Return what is wrong with the inputs of one step: their names and kinds, and what is missing or empty."""
    problems = []
    stage, signature = entries[name].name, signature_of(entries[name])
    kinds = {item.name: item.kind for item in signature.inputs}
    required = {item: "a model" if kind == "model" else f"a table of {kind}" for item, kind in kinds.items()}
    for item, source in sources.items():
        if item not in kinds:
            problems.append(f"{name}.from.{item}: {stage} has no such input; {nearest(item, list(kinds))}")
        elif source in entries and not signature_of(entries[source]).makes(kinds[item]):
            problems.append(
                f"{name}.from.{item}: needs {required[item]}, and step {source!r} ({entries[source].name}) makes none"
            )
        elif source in options and (cure := signature_of(entries[source]).omits(options[source]).get(kinds[item])):
            steps = {"source": split_round(source)[0], "reader": split_round(name)[0], "item": item}
            problems.append(
                f"{name}.from.{item}: the table of {kinds[item]} of step {source!r} would be empty; "
                f"{Template(cure).substitute(steps)}"
            )
    return problems + [
        f"{name}.from.{item.name}: required ({required[item.name]}): add `{item.name}` under `from`"
        for item in signature.inputs
        if not item.optional and item.name not in sources
    ]


def _origin_problems(
    order: list[str], entries: dict[str, Entry], sources: dict[str, dict[str, str]], options: dict[str, dict[str, Any]]
) -> list[str]:
    """Return a line for each step whose inputs are of the prompts of different files: ids of one are not in the other.

    Examples to train on contain all that is read of them, and may be of any prompts; so may tables of another round.
    """

    def data_of(name: str) -> list[Any]:
        data = [canonical(options.get(name, {}).get(option)) for option in ("path", "dataset")]
        return data if any(data) else [name]

    origins: dict[str, list[str]] = {}  # the steps that have read the prompts which a step's tables are of
    problems = []
    for name in [name for name in order if name in entries]:
        signature = signature_of(entries[name])
        of_prompts = [
            item.name
            for item in signature.inputs
            if item.schema is not None and "prompt_id" in item.schema.names and item.kind != "examples"
        ]
        tables = {
            item: source
            for item, source in sources[name].items()
            if item in of_prompts and source in origins and split_round(source)[1] in (None, split_round(name)[1])
        }
        origins[name] = list(dict.fromkeys(origin for source in tables.values() for origin in origins[source]))
        if not tables and signature.makes("prompts"):
            # Steps that read one file may differ in other options, and have its prompts in common.
            alike = (other for other in origins if origins[other] == [other] and data_of(other) == data_of(name))
            origins[name] = [next(alike, name)]
        if len(origins[name]) < 2 or any(len(origins[source]) > 1 for source in tables.values()):
            continue  # the second: it follows from a step before, of which it is said
        inputs = {
            origin: [f"{item} ({source})" for item, source in tables.items() if origins[source] == [origin]]
            for origin in origins[name]
        }
        listed = "; ".join(f"{', '.join(items)}: {origin}" for origin, items in inputs.items())
        cure = "let all of them come from one step of prompts"
        if "prompts" in tables and len(inputs) == 2:
            (other,) = (origin for origin in inputs if [origin] != origins[tables["prompts"]])
            readers = [source for source in dict.fromkeys(tables.values()) if origins[source] == [other]]
            lines = [f"`{source}: {{from: {{prompts: {tables['prompts']}}}}}`" for source in readers]
            cure = f"write `{name}: {{from: {{prompts: {other}}}}}`, or {' and '.join(lines)}"
        problems.append(f"{name}.from: its inputs are of different prompts ({listed}); {cure}")
    return problems


def _check_stages(
    order: list[str], entries: dict[str, Entry], sources: dict[str, dict[str, str]], options: dict[str, dict[str, Any]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return what the checks of stages find, and what they warn of: by the text, the steps of which it is said."""
    problems: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    checked: dict[str, InputStep] = {}
    for name in order:
        inputs = {item: checked[source] for item, source in sources[name].items() if source in checked}
        stage = entries[name].name if name in entries else ""
        checked[name] = InputStep(stage, options.get(name, {}), inputs, split_round(name)[0])
        if name not in options:
            continue
        with entries[name].failures(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for problem in signature_of(entries[name]).check(options[name], inputs):
                problems.setdefault(problem, []).append(name)
        for item in caught:
            if issubclass(item.category, WinnowWarning):
                notes.setdefault(str(item.message), []).append(name)
            else:
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
    return problems, notes


def _where_written(problems: dict[str, list[str]], likes: Mapping[str, str]) -> list[str]:
    """Return problems with options, by step, but those of a step that has them from the one that it is like."""
    having: dict[str, set[str]] = {}  # steps as the recipe writes them, by what is wrong
    for step, lines in problems.items():
        for line in lines:
            having.setdefault(line.removeprefix(step), set()).add(split_round(step)[0])
    return [
        line
        for step, lines in problems.items()
        for line in lines
        if not _inherits(split_round(step)[0], having[line.removeprefix(step)], likes)
    ]


def _inherits(step: str, others: Collection[str], likes: Mapping[str, str]) -> bool:
    """Return whether a step is like one of the others, or like a step that is."""
    while step := likes.get(step, ""):
        if step in others:
            return True
    return False


def _base_names(steps: list[str]) -> list[str]:
    """Return the names of steps, that of several rounds once, without its number."""
    bases = [split_round(step)[0] for step in steps]
    names = [base if bases.count(base) > 1 else step for base, step in zip(bases, steps, strict=True)]
    return list(dict.fromkeys(names))


def _without_rounds(problems: list[str]) -> list[str]:
    """Return a mistake that several rounds share once, under the step's name as the recipe writes it."""
    alike: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        alike.setdefault(re.sub(r"(?<=\w)@\d+\b", "", problem), []).append(problem)
    return [re.sub(r"^(\w+)@\d+", r"\1", same[0]) if len(same) > 1 else same[0] for same in alike.values()]
