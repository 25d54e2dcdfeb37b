"""Room 7: the loop, once, with one network in memory. It knows no method's name."""

from functools import partial
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import EXECUTION, Bound, Range, StageContext, stage
from schemas import Examples, Metrics, Model, Policies, Speeds, WinnowError
from schemas.tables import METRICS, POLICIES, SPEEDS
from stages.training.checks import LIKELIHOOD, optimize_needs
from stages.training.mixing import mix as mixes
from stages.training.objectives import objective as objectives

Positive = Annotated[int, Range(gt=0)]
Share = Annotated[float, Range(ge=0, le=1)]
SPEED = "speed/"  # begins the names of what the machine did
LAST = 0.1  # share of a run's steps whose mean loss is taken for what its objective alone can reach


@stage(version=4, unsharded=True, check=optimize_needs)
def optimize(
    init: Model,
    examples: Examples,
    ctx: StageContext,
    heldout: Examples | None = None,
    demonstrations: Examples | None = None,
    heldout_demonstrations: Examples | None = None,
    preference_optimum: Metrics | None = None,
    imitation_optimum: Metrics | None = None,
    *,
    objective: Annotated[Bound, objectives],
    nll_weight: Annotated[float, Range(ge=0)] = 0.0,
    nll_per: Literal["token", "response"] = "token",
    mix: Annotated[Bound, mixes] | None = None,
    reference: Literal["init", "other"] = "init",
    learning_rate: Annotated[float, Range(gt=0)],
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear",
    warmup_ratio: Share = 0.1,
    batch_size: Positive = 32,
    epochs: Positive = 1,
    max_grad_norm: Annotated[float, Range(gt=0)] = 1.0,
    weight_decay: Annotated[float, Range(ge=0)] = 0.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    lora_r: Annotated[int, Range(ge=0)] = 0,
    lora_alpha: Annotated[float, Range(gt=0)] | None = None,
    lora_target_modules: list[str] = [],  # noqa: B006 - read, never written
    tokens_per_pass: Annotated[int, Range(gt=0), EXECUTION] = 8192,
    gradient_checkpointing: Annotated[bool, EXECUTION] = False,
    world_size: Annotated[int, Range(gt=0), EXECUTION] = 1,
    checkpoint_every: Annotated[int, Range(gt=0), EXECUTION] = 100,
    seed: int = 0,
) -> tuple[Model, Policies, Metrics, Speeds]:
    """Minimise objective + nll_weight * nll with AdamW from `init` over `examples`.

    A step takes whole groups until they hold batch_size pairs (labels for unpaired losses, weighted
    responses for nll). Sums are divided by the number of pairs (labels; tokens or responses that are imitated,
    as nll_per says) of the whole step, so accumulation changes nothing and weights keep their scale. If the
    objective reads a reference, step 0 must have the loss that policy = reference gives, or training refuses
    to start: a stale cache would train another objective. `reference: other` says that the cached policy is
    not `init`, as when rounds go on from each other and the reference stays the SFT policy. A rerun goes on
    from the last checkpoint, bit for bit on the same machine.

    `lora_r` is the rank of what is trained beside each frozen layer that `lora_target_modules`
    names (none: every linear layer but the head), times `lora_alpha` / rank (none: 2); 0 trains all weights.
    `gradient_checkpointing` runs each layer again
    in the backward pass instead of keeping its activations: less memory for the time of one more forward pass.

    `ranks` processes hold one network together, a piece each (FSDP2 under Ray Train; a GPU each where there are any),
    and share the groups of each step: the same losses to rounding, and a death costs what was done since the last
    checkpoint.

    With `demonstrations`, `mix` says in each step how much is the objective and how much the likelihood of
    what the demonstrations imitate. There are as many steps as `epochs` over `examples` take; each side goes
    through its own batches as often as its turn comes. `preference_optimum` and `imitation_optimum` are the
    metrics of runs of one side alone, for a mix that watches how far each still is from its own best; the mean
    loss of their last tenth counts, and 0 without them.
    """
    from stages.training.trainer import train

    adapt = None
    if lora_r:
        from stages.network.lora import add_adapter

        adapt = partial(add_adapter, rank=lora_r, alpha=lora_alpha, targets=lora_target_modules, seed=seed)
    job = partial(
        train,
        init,
        [(examples, heldout, objective, nll_weight), (demonstrations, heldout_demonstrations, LIKELIHOOD, 0.0)],
        ctx.keep,
        reference=reference,
        of_leg=dict(nll_per=nll_per, batch_size=batch_size, dtype=dtype, tokens_per_pass=tokens_per_pass),
        of_run=dict(
            adapt=adapt,
            gradient_checkpointing=gradient_checkpointing,
            mix=mix,
            optima=[_reached(preference_optimum, "loss"), _reached(imitation_optimum, "imitation/loss")],
            gated="ref" in objective.metadata["reads"] and reference == "init",
            learning_rate=learning_rate,
            lr_scheduler_type=lr_scheduler_type,
            warmup_ratio=warmup_ratio,
            epochs=epochs,
            max_grad_norm=max_grad_norm,
            weight_decay=weight_decay,
        ),
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    if world_size == 1:
        outcome = job(ctx.progress)
    else:
        from pipeline.execution.distributed import run_distributed

        outcome = run_distributed(job, world_size, ctx)
    ctx.count(tokens=outcome["tokens"])
    loss = f"{objective} + {nll_weight} nll" if nll_weight else str(objective)
    row = {
        "init": init.digest,
        "objective": f"{loss}, {mix}" if mix else loss,
        **{name: outcome[name] for name in ("parameters", "steps", "tokens")},
    }
    policy = pa.Table.from_pylist([row], schema=POLICIES)
    return Model(ctx.folder / "model", ""), policy, *_history(outcome["history"])


def _reached(metrics: pa.Table | None, name: str) -> float:
    """The mean of a loss over the last tenth of its steps; 0 where no run is wired."""
    if metrics is None:
        return 0.0
    rows = metrics.filter(pc.equal(metrics["metric"], name)).sort_by("step").column("value").to_pylist()
    if not rows:
        raise WinnowError(
            f"the run wired as an optimum has no metric {name!r}; give it `mix: {{name: joint, weight: ...}}`"
        )
    last = rows[-max(1, round(LAST * len(rows))) :]
    return float(sum(last) / len(last))


def _history(entries: list[dict[str, float]]) -> tuple[pa.Table, pa.Table]:
    """Metrics, which the same inputs make again, and speeds, which they do not."""
    metrics, speeds = [], []
    for entry in entries:
        step = int(entry["step"])
        for name, value in entry.items():
            if name.startswith(SPEED):
                speeds.append({"step": step, "measure": name.removeprefix(SPEED), "value": float(value)})
            elif name != "step":
                metrics.append({"step": step, "metric": name, "value": float(value)})
    return pa.Table.from_pylist(metrics, schema=METRICS), pa.Table.from_pylist(speeds, schema=SPEEDS)
