"""Memory of a ranker: that of scoring by its network, or of the engine that a judge answers with."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline import Bound, InputStep
from pipeline.costs import Change, Cost, Device, Need
from stages.network.memory import scoring_need
from stages.sampling import memory as engine
from stages.sampling.devices import vllm_problem

SAMPLING = ("llm_judge", "local_voter")  # judges whose answers an engine samples
QUESTION_TOKENS = 4096  # of a judge's question, for the engine transformers


def ranker_cost(work: Callable[..., Any]) -> Cost:
    """Return the cost of a stage that ranks, from the work that it does."""
    return Cost(ranker_need, less_ranker_memory, work, ranker_device_problem, ranker_gpus)


def ranker_need(options: Mapping[str, Any], inputs: Mapping[str, InputStep], device: Device) -> Need | None:
    """Return the memory of the ranker that `by` names; None for programs, rankers of plugins, and what is served."""
    by: Bound = options["by"]
    if by.name in SAMPLING:
        return engine.sampling_need(by.options, inputs.get("ranker"), QUESTION_TOKENS, device)
    if not by.metadata.get("output") or by.name == "endpoint":
        return None
    return scoring_need(inputs.get("ranker"), by.options["dtype"], device)


def ranker_device_problem(options: Mapping[str, Any], inputs: Mapping[str, InputStep], device: Device) -> str:
    """Return why a device cannot run the engine of a judge, and the cure; "" if it can."""
    by: Bound = options["by"]
    if by.name not in SAMPLING:
        return ""
    problem = vllm_problem(by.options["engine"], inputs.get("ranker"), device)
    return problem and f"by.{problem}"


def ranker_gpus(options: Mapping[str, Any], device: Device) -> int:
    """Return on how many GPUs a ranker computes: torch on one, a judge's engine on its own."""
    by: Bound = options["by"]
    return engine.engine_gpus(by.options, device) if by.name in SAMPLING else 1


def less_ranker_memory(options: Mapping[str, Any], device: Device) -> Iterable[Change]:
    """Yield changes that take less memory: those of a judge's engine."""
    by: Bound = options["by"]
    if by.name not in SAMPLING:
        return
    for setting, changed, changed_device in engine.less_engine_memory(by.options, device):
        yield f"in `by`: {setting}", dict(options) | {"by": Bound(by.entry, dict(changed))}, changed_device
