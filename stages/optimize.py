"""Room 7: the loop, once, with one network in memory. It knows no method's name."""

from typing import Annotated, Any, Literal

import pyarrow as pa

from pipeline import EXECUTION, Bound, Range, Workspace, stage
from schemas import Examples, Metrics, Model, Policies
from schemas.tables import METRICS, POLICIES
from stages.objectives import objective as objectives

Positive = Annotated[int, Range(gt=0)]
Share = Annotated[float, Range(ge=0, le=1)]


@stage(version=1, whole=True)
def optimize(
    init: Model,
    examples: Examples,
    ws: Workspace,
    heldout: Examples | None = None,
    *,
    objective: Annotated[Bound, objectives],
    nll_weight: Annotated[float, Range(ge=0)] = 0.0,
    lr: Annotated[float, Range(gt=0)],
    schedule: Literal["constant", "linear", "cosine"] = "linear",
    warmup: Share = 0.1,
    batch_size: Positive = 32,
    epochs: Positive = 1,
    clip: Annotated[float, Range(gt=0)] = 1.0,
    weight_decay: Annotated[float, Range(ge=0)] = 0.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    micro_tokens: Annotated[int, Range(gt=0), EXECUTION] = 8192,
    checkpoint_every: Annotated[int, Range(gt=0), EXECUTION] = 100,
    seed: int = 0,
) -> tuple[Model, Policies, Metrics]:
    """Minimise objective + nll_weight * nll with AdamW from `init` over `examples`.

    A step takes whole groups until they hold batch_size pairs (or weighted responses, for nll). Sums are
    divided by the pairs (or weighted tokens) of the whole step, so accumulation changes nothing. If the
    objective reads a reference, step 0 must have the loss that policy = reference gives, or training
    refuses to start: a stale cache would train another objective. A rerun goes on from the last
    checkpoint, bit for bit on the same machine.
    """
    from stages.training import Trainer, groups_of

    groups = groups_of(examples, objective, nll_weight, init, dtype)
    trainer = Trainer(
        init=init,
        objective=objective,
        nll_weight=nll_weight,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        batch_size=batch_size,
        epochs=epochs,
        clip=clip,
        weight_decay=weight_decay,
        dtype=dtype,
        micro_tokens=micro_tokens,
        seed=seed,
    )
    held = groups_of(heldout, objective, nll_weight, init, dtype) if heldout is not None else []
    trained = trainer.fit(groups, held, ws, checkpoint_every)
    return trained, _policy_row(trainer, objective, nll_weight, ws), _metric_rows(trainer.history)


def _policy_row(trainer: Any, objective: Bound, nll_weight: float, ws: Workspace) -> pa.Table:
    row = {
        "init": trainer.init.digest,
        "objective": f"{objective} + {nll_weight} nll" if nll_weight else str(objective),
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "steps": trainer.done,
        "tokens": ws.counters["tokens"],
    }
    return pa.Table.from_pylist([row], schema=POLICIES)


def _metric_rows(history: list[dict[str, float]]) -> pa.Table:
    rows = [
        {"step": int(entry["step"]), "metric": name, "value": float(value)}
        for entry in history
        for name, value in entry.items()
        if name != "step"
    ]
    return pa.Table.from_pylist(rows, schema=METRICS)
