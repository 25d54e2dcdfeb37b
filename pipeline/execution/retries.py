"""What becomes of a unit that failed: tried again, halved until the prompt is found that kills its worker, left out.

A part has three attempts, each on a fresh worker. Then it is halved, and what fails of it is halved again, so that
one bad prompt costs about log2 of the part's prompts in workers; a prompt that fails three times alone is left out.
Where nothing of a step ever worked, it is not the prompts, and the step fails.
"""

from collections import Counter, defaultdict

from pipeline.execution.tasks import POISON, StepSpec, Task, join
from schemas import WinnowError

ATTEMPTS = 3
MOST = 8  # prompts that a step may lose so


class Retries:
    """Of the units of one step; the only state of a run that is not in the store."""

    def __init__(self, work: StepSpec) -> None:
        self.work = work
        self.worked = False
        self.poison: dict[str, str] = {}
        self._tries: Counter[Task] = Counter()
        self._pieces: dict[int, set[Task]] = defaultdict(set)
        self._open: dict[int, set[Task]] = defaultdict(set)
        self._prompts: dict[int, list[str]] = {}

    def suspect(self, unit: Task) -> bool:
        """One that failed before, or a piece of one: it runs alone on its worker, so that no other dies with it."""
        return unit.span is not None or self._tries[unit] > 0

    def succeeded(self, unit: Task) -> bool:
        """Is its part finished with it?"""
        self.worked = True
        if unit.span is None:
            return True
        self._pieces[unit.shard].add(unit)
        self._open[unit.shard].discard(unit)
        return self._finished(unit.shard)

    def failed(self, unit: Task, error: Exception) -> tuple[list[Task], bool]:
        """What is to be tried next instead, and whether its part is finished; raises WinnowError where no hope is."""
        words = _last_words(error)
        self._tries[unit] += 1
        of_place = isinstance(error, OSError | ImportError)  # nothing that a prompt could be guilty of
        if self._tries[unit] < (1 if _of_several(unit) and not of_place else ATTEMPTS):
            return [unit], False
        prompts = self._prompts_of(unit)
        if of_place or self.work.unsharded or not prompts:
            raise WinnowError(f"{self.work.name}: part {unit.shard} failed {ATTEMPTS} times; the last time: {words}")
        if len(prompts) > 1:
            return self._halves(unit, len(prompts)), False
        return [], self._left_out(unit, prompts[0], words)

    def _prompts_of(self, unit: Task) -> list[str]:
        if self.work.unsharded:
            return []
        if unit.shard not in self._prompts:
            self._prompts[unit.shard] = self.work.prompts(unit.shard)
        first, last = unit.span or (0, None)
        return self._prompts[unit.shard][first:last]

    def _halves(self, unit: Task, size: int) -> list[Task]:
        first = unit.span[0] if unit.span else 0
        middle = first + size // 2
        halves = [Task(unit.shard, (first, middle)), Task(unit.shard, (middle, first + size))]
        self._open[unit.shard] -= {unit}
        self._open[unit.shard] |= set(halves)
        return halves

    def _left_out(self, unit: Task, prompt: str, words: str) -> bool:
        self.poison[prompt] = words
        self._open[unit.shard] -= {unit}
        if len(self.poison) > (MOST if self.worked else 1):
            ever = "" if self.worked else ", and nothing of this step ever worked"
            raise WinnowError(
                f"{self.work.name}: {len(self.poison)} prompts each {POISON} {ATTEMPTS} times{ever}; it may not be the "
                f"prompts: look at the worker's memory and log; the last time: {words}"
            )
        return self._finished(unit.shard)

    def _finished(self, shard: int) -> bool:
        """Once all pieces are there, they are made into the part."""
        if self._open[shard]:
            return False
        if self.work.out.sidecar(shard):  # another run was first, and its pieces may be gone
            return True
        if not self.worked:
            words = next(iter(self.poison.values()))
            raise WinnowError(f"{self.work.name}: nothing of this step ever worked; the last time: {words}")
        of_part = {prompt: self.poison[prompt] for prompt in self._prompts[shard] if prompt in self.poison}
        join(self.work, shard, sorted(self._pieces[shard], key=lambda unit: unit.span or (0, 0)), of_part)
        return True


def _of_several(unit: Task) -> bool:
    return unit.span is not None and unit.span[1] - unit.span[0] > 1


def _last_words(error: Exception) -> str:
    """The end of a message, where a traceback has its cause; the beginning of that line, for some are long."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__
