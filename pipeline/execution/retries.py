"""Retry a failed task, bisect its part to find the prompt that kills its worker, and reject that prompt.

A part has three attempts, each on a fresh worker. Then it is halved, and a half that fails is halved again, so that
one bad prompt costs about log2 of the part's prompts in workers; a prompt that fails three times alone is rejected.
If nothing of a step has ever succeeded, the prompts are not the cause, and the step fails.

    a task fails
     |- WinnowError (user error, not retried) -------------------------> the run fails    (schedule.py)
     |- a part or a prompt, before its third failure ------------------> the same task again
     |- OSError, ImportError, or an unsharded stage: third failure ----> the step fails
     |- a part of several prompts: third failure; a piece: first ------> its two halves, each a task
     `- a prompt alone: third failure ---------------------------------> rejected; too many of them: the step fails
    a task succeeds
     |- a part --------------------------------------------------------> the part is finished
     `- a piece: once no other piece is open --------------------------> the pieces are joined to the part
"""

import errno
from collections import Counter, defaultdict

from pipeline.execution.tasks import POISON, StepSpec, Task, join
from pipeline.processes import DeadProcessError
from schemas import MachineError, WinnowError

MAX_ATTEMPTS = 3
# Of the operating system's errors, those that the same call gives again: not a full disk, not a lost connection.
LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
FULL = "free some space there, or set --store to a folder on another disk"
DENIED = "let this user write and read there, or set --store to another folder"
CURES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EROFS: DENIED,
    errno.EMFILE: "raise the limit of open files of this shell, as in `ulimit -n 65536`",
    errno.ENFILE: "too many files are open on this machine; end other programs",
    errno.ENOMEM: "end other programs, or give this one more memory",
}
MAX_POISON_PROMPTS = 8  # rejected per step; beyond that the cause is elsewhere


def may_pass(error: BaseException) -> bool:
    """Return whether the same command may succeed later: a machine failed, not the data, the options or the code."""
    kind = type(error)
    if kind.__module__.startswith("ray.exceptions") or kind.__name__ == "OutOfMemoryError":  # Ray's or torch's
        return not kind.__name__.startswith("RayTaskError")
    if isinstance(error, OSError):
        return not isinstance(error, LASTING)
    return isinstance(error, MachineError | MemoryError | DeadProcessError)


def describe_os_error(error: OSError) -> str:
    """Return the message of an error of the operating system, with what to do about it where that is known."""
    cure = CURES.get(error.errno or 0)
    return f"{error}; {cure}" if cure else str(error)


def failure(message: str, error: BaseException) -> WinnowError:
    """Return the error that ends a step after its last attempt failed with `error`."""
    return MachineError(message) if may_pass(error) else WinnowError(message)


class Retries:
    """Attempts of one step's tasks: the only state of a run that is not in the store.

    After a crash of the run, a part that was being bisected starts again as a whole, with three attempts: the pieces
    of it that were finished are forgotten.
    """

    def __init__(self, spec: StepSpec) -> None:
        self.spec = spec
        self.poison: dict[str, str] = {}  # prompts that killed their workers, with the last message
        self._last_error: Exception = WinnowError()
        self._any_success = False
        self.attempts: Counter[Task] = Counter()  # that failed
        self._finished_pieces: dict[int, set[Task]] = defaultdict(set)
        self._open_pieces: dict[int, set[Task]] = defaultdict(set)
        self._prompts: dict[int, list[str]] = {}

    def succeeded(self, task: Task) -> bool:
        """Record a success and return whether its part is finished."""
        self._any_success = True
        if task.span is None:
            return True
        self._finished_pieces[task.shard].add(task)
        self._open_pieces[task.shard].discard(task)
        return self._join_if_complete(task.shard)

    def failed(self, task: Task, error: Exception) -> tuple[list[Task], bool]:
        """Record a failure and return the tasks to run instead, and whether the part is finished.

        Raise WinnowError if the step cannot succeed.
        """
        # Of a traceback, the last line has the cause; of that line the beginning, for some are long
        text = describe_os_error(error) if isinstance(error, OSError) else str(error)
        lines = text.strip().splitlines()
        message = lines[-1].strip()[:200] if lines else type(error).__name__
        self.attempts[task] += 1
        self._last_error = error
        no_prompt_is_guilty = isinstance(error, OSError | ImportError)
        bisecting = task.span is not None and task.span[1] - task.span[0] > 1
        if self.attempts[task] < (1 if bisecting and not no_prompt_is_guilty else MAX_ATTEMPTS):
            return [task], False

        # The prompts of the task. A stage that is called once is not bisected: its result is not a union over prompts
        shard, (first, last) = task.shard, task.span or (0, None)
        if not self.spec.signature.unsharded and shard not in self._prompts:
            self._prompts[shard] = self.spec.prompts(shard)
        prompts = self._prompts.get(shard, [])[first:last]
        if no_prompt_is_guilty or not prompts:
            raise failure(f"{self.spec.name}: part {shard} failed {MAX_ATTEMPTS} times; last error: {message}", error)

        self._open_pieces[shard].discard(task)
        if len(prompts) > 1:
            middle, last = first + len(prompts) // 2, first + len(prompts)
            halves = [Task(shard, (first, middle)), Task(shard, (middle, last))]
            self._open_pieces[shard].update(halves)
            return halves, False
        self.poison[prompts[0]] = message
        if len(self.poison) > (MAX_POISON_PROMPTS if self._any_success else 1):
            never = "" if self._any_success else ", and no task of this step ever succeeded"
            raise failure(
                f"{self.spec.name}: {len(self.poison)} prompts each {POISON} {MAX_ATTEMPTS} times{never}; the prompts "
                f"may not be the cause: check the worker's memory and its log; last error: {message}",
                error,
            )
        return [], self._join_if_complete(shard)

    def _join_if_complete(self, shard: int) -> bool:
        """Write a part once no piece of it is open, and return whether it is finished."""
        if self._open_pieces[shard]:
            return False
        if self.spec.out.sidecar(shard):  # another run finished it first, and may have deleted the pieces
            return True
        if not self._any_success:
            message = next(iter(self.poison.values()))
            raise failure(
                f"{self.spec.name}: no task of this step ever succeeded; last error: {message}", self._last_error
            )
        poison = {prompt: self.poison[prompt] for prompt in self._prompts[shard] if prompt in self.poison}
        join(self.spec, shard, sorted(self._finished_pieces[shard], key=lambda task: task.span or (0, 0)), poison)
        return True
