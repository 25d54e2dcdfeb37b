"""Decide which tasks of which steps can run now.

Tasks of a later step start as soon as the parts that they read are finished, if the executor has room, and so do those
of other plans: the trainings of a sweep run at once. What is missing is read from the store when a step starts, so a
run that died goes on, and another run's parts count. What happens when a task fails is drawn in retries.py.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.config.plan import Plan, Step
from pipeline.context import Progress
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.progress import ProgressFile, StepProgress
from pipeline.execution.retries import Retries
from pipeline.execution.tasks import (
    StepSpec,
    Task,
    TaskResult,
    check_not_empty,
    is_split_by_prompt,
    read_rejects,
    step_spec,
)
from pipeline.store.inventory import followers_of
from pipeline.store.store import Json, StepLock, Store, overlapping
from schemas import MachineError, WinnowError

POLL_SECONDS = 0.2


class Reporter:
    """Listener to a run, for the users who watch it; this one ignores what it hears.

    A step is cached if it is finished in the store already; it is reported as waiting once. It starts with `done` of
    `total` parts finished by an earlier run, and it is finished once its manifest is written. A prompt is rejected
    here if it killed each of its workers, the last one with `message`. Files of a step were set aside because they were
    damaged, or all of it (`stage/key`) because it was computed from a damaged result that is another now. A step that
    failed is reported if plans that do not need it go on, and so are the running steps that end with it.
    """

    def step_cached(self, step: Step) -> None: ...
    def step_waiting(self, step: Step, why: str) -> None: ...
    def set_aside(self, step: Step, names: list[str]) -> None: ...
    def step_started(self, step: Step, done: int, total: int) -> None: ...
    def part_finished(self, step: Step) -> None: ...
    def progress(self, step: Step, done: float, total: float, unit: str, figures: Mapping[str, float]) -> None: ...
    def prompt_rejected(self, step: Step, prompt: str, message: str) -> None: ...
    def step_finished(self, step: Step, manifest: Json) -> None: ...
    def step_failed(self, step: Step, error: WinnowError) -> None: ...
    def step_ended(self, step: Step) -> None: ...


@dataclass
class RunningStep:
    """Step that was started and is not finished: claimed in the store, with the tasks that remain."""

    step: Step
    spec: StepSpec
    claim: StepLock
    retries: Retries
    todo: deque[Task]
    finished_parts: set[int]
    progress: StepProgress
    progress_file: ProgressFile
    running_tasks: int = 0
    started: float | None = None  # when its first task was


class Scheduler:
    """Runs plans on one executor: at once, and a step that several of them need once.

    If a step fails, the plans that need it end, and the others go on. `record_of` returns what a manifest records of a
    step besides its parts, given the seconds that it took.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        store: Store,
        executor: LocalExecutor,
        reporter: Reporter,
        record_of: Callable[[Step, float], Json],
    ) -> None:
        self.plans = list(plans)  # without those that have failed
        self.store, self.executor, self.reporter, self.record_of = store, executor, reporter, record_of
        self.run_names: dict[str, str] = {}  # by key of a step: the first plan that has it
        self.waiting: list[Step] = []
        for plan in plans:
            steps = plan.steps_to_run
            self.waiting += [step for step in steps if self.run_names.setdefault(step.key, plan.name) == plan.name]
        self.running: dict[str, RunningStep] = {}  # by key, which is the name of the step's folder
        # Keys of finished steps. Of a partial rerun, inputs outside of the plan are finished, which was checked before
        self.finished = {source.key for step in self.waiting for source in step.inputs.values()} - self.run_names.keys()
        self.reported_waiting: set[str] = set()
        self.repairing: set[str] = set()  # keys of running steps that were finished once, and damaged
        self.errors: list[WinnowError] = []  # of plans that have failed

    def run(self) -> None:
        """Run all steps to their end; raise WinnowError with what failed, as soon as nothing else can run."""
        steps = self.running
        self.executor.on_progress = lambda spec, progress: self._report_progress(steps[spec.out.path.name], progress)
        self.executor.on_stall = lambda spec, reason: self._report_waiting(steps[spec.out.path.name].step, reason)
        try:
            while self.waiting or self.running:
                self._start_steps()
                if not (self.waiting or self.running):  # all of them were in the store
                    break
                unfinished = self.running.keys() | {step.key for step in self.waiting}
                at_work = [plan for plan in self.plans if any(step.key in unfinished for step in plan.steps_to_run)]
                self.executor.plans = len(at_work)
                self._submit_tasks()
                for result in self.executor.wait(POLL_SECONDS):
                    running = self.running.get(result.spec.out.path.name)
                    if running is None:  # the last result before this one ended the plans that need its step
                        continue
                    try:
                        self._handle_result(running, result)
                    except WinnowError as error:
                        self._end_plans(running, error)
                self._finish_steps()
        finally:
            self.executor.close()
            for running in self.running.values():
                running.progress_file.delete()
                running.claim.release()
        if self.errors:
            raise self._error()

    def _end_plans(self, failed: RunningStep, error: WinnowError) -> None:
        """End the plans that need a step that failed; raise what failed in all of them if no plan is left."""
        self.plans = [plan for plan in self.plans if failed.spec.key not in self._needed([plan])]
        self.errors.append(error)
        if not self.plans:
            raise self._error()
        self.reporter.step_failed(failed.step, error)
        needed = self._needed(self.plans)
        self.waiting = [step for step in self.waiting if step.key in needed]
        for running in [running for running in self.running.values() if running.spec.key not in needed]:
            self.executor.end(running.spec)
            del self.running[running.spec.key]
            running.progress_file.delete()
            running.claim.release()
            if running is not failed:
                self.reporter.step_ended(running.step)

    def _needed(self, plans: Sequence[Plan]) -> set[str]:
        """Return the keys of the unfinished steps that plans need, also of those that only the part of another runs."""
        steps = {step.key: step for step in self.waiting}
        steps |= {key: running.step for key, running in self.running.items()}
        open_keys = [step.key for plan in plans for step in plan.steps_to_run]
        needed = set[str]()
        while open_keys:
            key = open_keys.pop()
            if key in steps and key not in needed:
                needed.add(key)
                open_keys += [source.key for source in steps[key].inputs.values()]
        return needed

    def _error(self) -> WinnowError:
        if len(self.errors) == 1:
            return self.errors[0]
        kind = MachineError if all(isinstance(error, MachineError) for error in self.errors) else WinnowError
        return kind(*dict.fromkeys(problem for error in self.errors for problem in error.problems))

    def _start_steps(self) -> None:
        """Start or skip each step whose inputs are finished, or are running if the executor overlaps steps."""
        for step in list(self.waiting):
            available = self.finished | self.running.keys() if self.executor.overlaps else self.finished
            available -= self.repairing  # whose followers are computed again too if it turns out otherwise than before
            if step.key in self.running or not available.issuperset(source.key for source in step.inputs.values()):
                continue
            if self._can_take_rows(step):  # of one that is running: what they have in common is computed once
                continue
            folder = self.store.folder(step)
            is_finished = folder.manifest is not None
            claim = None if is_finished else folder.try_lock()
            if claim and folder.manifest is not None:  # another run finished it before we had the claim
                claim.release()
                is_finished = True
            if is_finished:
                self.waiting.remove(step)
                self.finished.add(step.key)
                self.reporter.step_cached(step)
            elif claim is None:
                self._report_waiting(step, "another run is making it")
            else:
                self.waiting.remove(step)
                if claim.path:
                    folder.sweep()
                if damaged := folder.set_aside_damaged():
                    self.reporter.set_aside(step, damaged)
                if folder.is_repaired:
                    self.repairing.add(step.key)
                unfinished = {key: running.spec.out for key, running in self.running.items()}
                spec = step_spec(step, self.store, self.run_names[step.key], unfinished)
                missing, parts = set(spec.out.missing()), spec.shards
                if spec.signature.unsharded:  # one call computes all parts
                    missing, parts = {0} if missing else set(), 1
                todo, finished_parts = deque(map(Task, sorted(missing))), set(range(parts)) - missing
                running = RunningStep(
                    step,
                    spec,
                    claim,
                    Retries(spec),
                    todo,
                    finished_parts,
                    StepProgress(parts, len(finished_parts)),
                    ProgressFile(spec.out),
                )
                self.running[step.key] = running
                running.progress_file.write(running.progress)
                self.reporter.step_started(step, len(finished_parts), parts)

    def _can_take_rows(self, step: Step) -> bool:
        """Return whether a running step computes rows that this one could take for its own once it is finished."""
        if not (step.signature.goes_on and step.takes_earlier_rows):
            return False
        others = (running.step for running in self.running.values())
        return any(other.signature.goes_on and other.row_key == step.row_key for other in others)

    def _submit_tasks(self) -> None:
        """Submit the tasks that can run, of earlier steps first: later steps wait for their parts."""
        for running in self.running.values():
            ready = [task for task in running.todo if self._inputs_finished(running, task)]
            self.executor.request_workers(running.spec, len(ready))
            for task in ready:
                failed_before = task.span is not None or running.retries.attempts[task] > 0
                if self.executor.submit(running.spec, task, exclusive=failed_before):  # it may kill its worker again
                    running.todo.remove(task)
                    running.running_tasks += 1
                    running.started = running.started or time.perf_counter()

    def _inputs_finished(self, running: RunningStep, task: Task) -> bool:
        """Return whether all that a task reads is finished: its prompts' parts of each input, or the whole input."""
        spec = running.spec
        for item in spec.signature.inputs:
            source = running.step.inputs.get(item.name)
            if source is None or source.key in self.finished:
                continue
            producer = self.running[source.key]
            if not is_split_by_prompt(item) or spec.signature.unsharded or producer.spec.signature.unsharded:
                return False
            if not producer.finished_parts.issuperset(overlapping(task.shard, spec.shards, producer.spec.shards)):
                return False
        return True

    def _handle_result(self, running: RunningStep, result: TaskResult) -> None:
        """Record the end of a task, and retry it or reject its prompt if it failed."""
        running.running_tasks -= 1
        if isinstance(result.error, WinnowError):  # user error: not retried
            raise result.error
        retries = running.retries
        rejected_before = set(retries.poison)
        if result.error is None:
            is_finished = retries.succeeded(result.task)
        else:
            instead, is_finished = retries.failed(result.task, result.error)
            running.todo.extendleft(reversed(instead))
        for prompt in retries.poison.keys() - rejected_before:
            self.reporter.prompt_rejected(running.step, prompt, retries.poison[prompt])
        if is_finished:
            running.finished_parts.add(result.task.shard)
            running.progress.finish_part()
            running.progress_file.write(running.progress)
            self.reporter.part_finished(running.step)

    def _finish_steps(self) -> None:
        """Write the manifest of each step without tasks, once those of its inputs are written."""
        for key, running in list(self.running.items()):
            sources = {source.key for source in running.step.inputs.values()}
            if key not in self.running or running.todo or running.running_tasks or not sources <= self.finished:
                continue
            self.executor.end(running.spec)
            seconds = time.perf_counter() - running.started if running.started else 0.0
            record = self.record_of(running.step, seconds)
            try:
                manifest = running.spec.out.seal(record, partial(self._check_result, running))
            except WinnowError as error:
                self._end_plans(running, error)
                continue
            self.repairing.discard(key)
            self.finished.add(key)
            del self.running[key]
            running.claim.release()
            self.reporter.step_finished(running.step, manifest)

    def _check_result(self, running: RunningStep, manifest: Json) -> None:
        """Raise WinnowError for an empty result; set aside what was computed from a result that this one replaces."""
        step, out = running.step, running.spec.out
        omitted = step.signature.omits(step.options)
        check_not_empty(step.name, step.options, manifest, partial(read_rejects, out), omitted)
        if step.key in self.repairing and not out.is_as_before(manifest):
            for stage, key in followers_of(step.key, self.store):
                folder = self.store.at(stage, key)
                if claim := folder.try_lock():
                    folder.set_aside()
                    claim.release()
                    later = next((other for other in self.waiting if other.key == key), step)
                    self.reporter.set_aside(later, [f"{stage}/{key}"])

    def _report_progress(self, running: RunningStep, progress: Progress) -> None:
        running.progress.update(*progress)
        running.progress_file.write(running.progress)
        self.reporter.progress(running.step, *progress)

    def _report_waiting(self, step: Step, why: str) -> None:
        if step.key not in self.reported_waiting:
            self.reported_waiting.add(step.key)
            self.reporter.step_waiting(step, why)
