"""Stage `optimize`: training, with one network in memory. Method-agnostic: the losses are in `objectives`."""

from dataclasses import fields
from functools import partial
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import ADDED, EXECUTION, Bound, Range, StageContext, stage
from pipeline.costs import Cost
from pipeline.registry import entry_of
from schemas import Candidates, Examples, Metrics, Model, Policies, Prompts, Speeds, WinnowError
from schemas.tables import METRICS, POLICIES, SPEEDS
from stages.options import (
    Count,
    NotNegative,
    Positive,
    Precision,
    Rounding,
    Seed,
    SmallCount,
    Temperature,
    Texts,
    TokenIds,
)
from stages.ranking.rankers import open_ranker
from stages.ranking.rankers import ranker as rankers
from stages.training.agreement import DIFFERENCE, LARGEST_DIFFERENCE, record_agreement
from stages.training.checks import LIKELIHOOD, check_optimize, validation_choices
from stages.training.config import SPEED, TermData, TrainConfig
from stages.training.memory import less_training_memory, training_need
from stages.training.mixing import UnitInterval
from stages.training.mixing import mix as mixes
from stages.training.objectives import objective as objectives
from stages.training.trackers import Trackers
from stages.work import training_work

LAST = 0.1  # fraction of a run's steps whose mean loss is taken for what its objective alone can reach


@stage(
    version=9,
    unsharded=True,
    check=check_optimize,
    given_by={"ranker": "by"},
    choose=validation_choices,
    cost=Cost(training_need, less_training_memory, training_work),
)
def optimize(
    init: Model,
    examples: Examples,
    ctx: StageContext,
    heldout: Examples | None = None,
    demonstrations: Examples | None = None,
    heldout_demonstrations: Examples | None = None,
    preference_optimum: Metrics | None = None,
    imitation_optimum: Metrics | None = None,
    prompts: Prompts | None = None,
    baseline: Candidates | None = None,
    ranker: Model | None = None,
    *,
    objective: Annotated[Bound, objectives],
    nll_weight: NotNegative = 0.0,
    nll_per: Literal["token", "response"] = "token",
    mix: Annotated[Bound, mixes] | None = None,
    reference: Literal["init", "other"] = "init",
    learning_rate: Positive,
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear",
    warmup_ratio: UnitInterval = 0.1,
    batch_size: SmallCount = 32,
    epochs: SmallCount = 1,
    max_grad_norm: Annotated[float, Range(gt=0)] = 1.0,  # infinite: no limit
    weight_decay: NotNegative = 0.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    lora_r: Annotated[int, Range(ge=0, le=10**6)] = 0,
    lora_alpha: Positive | None = None,
    lora_target_modules: list[str] = [],  # noqa: B006 - read, never written
    engine_tolerance: Annotated[Positive, EXECUTION] = 1.0,
    merge_lora: bool = False,
    save_dtype: Precision = "float32",
    save_rounding: Rounding = "nearest",
    tokens_per_pass: Annotated[Count, EXECUTION] = 8192,
    gradient_checkpointing: Annotated[Literal[False, True, "auto"], EXECUTION] = "auto",
    compile_layers: Annotated[bool, EXECUTION] = False,
    world_size: Annotated[SmallCount, EXECUTION] = 1,
    checkpoint_every: Annotated[Count, EXECUTION] = 100,
    track: Annotated[Trackers, EXECUTION] = [],  # noqa: B006 - read, never written
    seed: Seed = 0,
    evaluate_every: Annotated[int, Range(ge=0, le=10**9), ADDED] = 0,
    evaluate_split: Annotated[Literal["validation", "heldout"], ADDED] = "validation",
    evaluate_n: Annotated[SmallCount, ADDED] = 1,
    evaluate_temperature: Annotated[Temperature, ADDED] = 1.0,
    evaluate_max_tokens: Annotated[Count | None, ADDED] = None,
    evaluate_stop: Annotated[Texts | None, ADDED] = None,
    evaluate_stop_token_ids: Annotated[TokenIds | None, ADDED] = None,
    by: Annotated[Annotated[Bound, rankers] | None, ADDED] = None,
    keep: Annotated[Literal["last", "best"], ADDED] = "last",
    learning_rate_scale: Annotated[Positive, ADDED] = 1.0,
) -> tuple[Model, Policies, Metrics, Speeds]:
    """Minimise objective + nll_weight * nll with AdamW from `init` over `examples`.

    A step takes whole groups until they hold batch_size pairs (labels for unpaired losses, weighted responses for nll).
    Sums are divided by the number of pairs (labels; tokens or responses that are imitated, as nll_per says) of the
    whole step, so accumulation changes nothing and weights keep their scale. If the objective reads a reference, step
    0 must have the loss that policy = reference gives, or training refuses to start: a stale cache would train another
    objective. `reference: other` declares that the cached policy is not `init`, as when rounds continue from each other
    and the reference stays the SFT policy. A rerun resumes from the last checkpoint, on a CPU bit for bit.

    Where no cached reference has compared draws of `init` with the engine's own log-probs, those of the first batch
    are, as `reference` does it; the difference is a metric of step 0, and `engine_tolerance` raises its limit.

    `learning_rate` is multiplied by `learning_rate_scale`, by which a recipe says that a round trains with a lower rate
    than others, whatever theirs is.

    `lora_r` is the rank of the LoRA beside each frozen layer that `lora_target_modules` names (none: every linear layer
    but the head), scaled by `lora_alpha` / rank (none: 2); 0 trains all weights. `gradient_checkpointing` computes each
    layer again in the backward pass instead of storing its activations: less memory for the time of one more forward
    pass. `auto` does so if the memory that `plan` estimates without it, and 15 % by which that may be off, is more than
    the device has (of the profile, or of the machine that trains). `compile_layers` lets torch compile each layer: on a
    GPU, faster by a third after a first step of some 20 s, and not proven there (tests/bench/h100.md).

    The policy is saved as it was trained: in fp32, 4 bytes a weight; a LoRA as an adapter beside the weights of `init`,
    in one folder that transformers with peft, vLLM and every stage read as a policy. `merge_lora` merges it into the
    weights. A run from a policy with an adapter goes on with that adapter, or, without `lora_r`, trains all weights of
    both together. `save_dtype: bfloat16` takes half the space and loses moves that are small beside a weight: a policy
    of bfloat16 starts on its grid, and `save_rounding: nearest` undoes each move of less than half a step;
    `stochastic` keeps their mean and adds noise.

    Held-out metrics are of the saved folder, loaded again. `saved/margin_kept` is the fraction of what training changed
    on the last batch that the folder has, by fp32 arithmetic, and `saved/margin_kept_bfloat16` that which engines read
    of it in bfloat16 (`sample` with `dtype: bfloat16`), by least squares over the pairs. There is neither where it
    changed less than 1e-4 nats (root mean square), and a warning where the first is not 0.9 to 1.1, or the second below
    0.5.

    If the config of a mixture of experts sets output_router_logits, its load balancing loss, times its
    router_aux_loss_coef, is added as transformers adds it, over the tokens of the whole step: metric `aux_loss`.

    `world_size` processes shard one network (FSDP2 under Ray Train, one GPU each where there are any) and divide the
    groups of each step among them: the same losses to rounding, and if one dies all resume from the last checkpoint.

    While training runs, its metrics are rows of the table `metrics_now`. `track` names trackers that get them too:
    `track: [tensorboard]`, or `{name: mlflow, uri: ...}`. One that fails is warned of, and training goes on without it;
    a run that resumes goes on in the tracker's run.

    evaluate_every: after so many steps, and after the last, the policy draws `evaluate_n` responses to each prompt of
    split `evaluate_split` that has a response in `baseline`, from its network in memory, and the ranker judges them
    against these, all against all, as stage `judge` does with `by`. Metrics: `validation/proxy_win` (as `proxy_win` of
    `evaluate`), `validation/proxy_unread`, `validation/n_tokens`, with a new LoRA `validation/kl` from `init`, and
    `heldout/` of the network in memory. `keep: best` saves the policy with the highest `validation/proxy_win`, of equal
    ones the first, as arXiv:2309.06657 chose its checkpoints; `steps` in `policies` is its own. The training itself
    stays as it is without, bit for bit.

    A draw has its own seed, the same at every evaluation. Responses end as those of `baseline`: `evaluate_max_tokens`,
    `evaluate_stop` and `evaluate_stop_token_ids` are its step's unless they are set. Gradients and activations are
    freed by then, and the ranker is in memory for this time alone: it takes more than training does only where its
    weights (fp32, 4 bytes each) and passes are larger than these. One behind an endpoint, or a program, takes none.

    With `demonstrations`, `mix` returns per step the weight of the objective against the likelihood of what the
    demonstrations imitate. There are as many steps as `epochs` over `examples` take; each term draws its next batch in
    the steps that give it a weight. `preference_optimum` and `imitation_optimum` are the metrics of runs of one term
    alone, for a mix that reads each term's excess loss over its own optimum: the mean loss of the last tenth of that
    run's steps, and 0 without one.
    """
    options = locals()  # by name
    from stages.training.card import write_trained_card
    from stages.training.live import LiveMetrics
    from stages.training.trainer import train_policy

    config = TrainConfig(
        **{option.name: options[option.name] for option in fields(TrainConfig)}
        | {"learning_rate": learning_rate * learning_rate_scale}
    )
    data = [TermData(examples, heldout, objective, nll_weight, _final_loss(preference_optimum, "loss"))]
    if demonstrations is not None:
        optimum = _final_loss(imitation_optimum, "imitation/loss")
        data.append(TermData(demonstrations, heldout_demonstrations, LIKELIHOOD, optimum=optimum))
    settings: dict[str, Any] = {"objective": objective, "nll_weight": nll_weight, "world_size": world_size}
    settings |= {option.name: getattr(config, option.name) for option in fields(config)}
    live = LiveMetrics(ctx.mirror, track, ctx.title, settings)
    validation = None
    if evaluate_every or keep == "best":
        from stages.training.validation import Validation

        if not evaluate_every or prompts is None or baseline is None or evaluate_max_tokens is None:
            raise WinnowError(
                "evaluations need `evaluate_every`, `prompts`, `baseline` and `evaluate_max_tokens`; give all four"
            )
        opening = partial(open_ranker, by or rankers.bind("pairwise"), ranker)
        validation = Validation(
            ctx, init, prompts, baseline, opening, split=evaluate_split, n=evaluate_n,
            temperature=evaluate_temperature, max_tokens=evaluate_max_tokens, stop=evaluate_stop or (),
            stop_token_ids=evaluate_stop_token_ids or (), seed=seed,
        )  # fmt: skip
    job = partial(train_policy, init, data, config, ctx.resources, ctx.mirror, live, validation)
    if world_size == 1:
        outcome = job(ctx.progress)
    else:
        from pipeline.execution.distributed import run_distributed

        outcome = run_distributed(job, world_size, ctx)

    # The policy's row; metrics, which the same inputs give again; speeds, which they do not.
    ctx.count(tokens=outcome["tokens_since_restore"])  # the step's seconds, too, are those of this process
    loss = f"{objective} + {nll_weight} nll" if nll_weight else str(objective)
    method = f"{loss}, {mix}" if mix else loss
    declared = entry_of(optimize)
    changed = {
        name: options[name]
        for name, option in declared.options.model_fields.items()
        if name not in declared.execution and options[name] != option.default
    }
    if by is not None:
        changed["by"] = by.name  # whose options may be of this machine
    write_trained_card(ctx.folder / "model", init, method, changed, examples, outcome)
    policy = {
        "init": init.digest,
        "objective": method,
        **{name: outcome[name] for name in ("parameters", "steps", "tokens")},
    }
    metrics, speeds = [], []
    for entry in outcome["history"]:
        step = int(entry.pop("step"))
        if DIFFERENCE in entry:
            record_agreement(ctx, {"total": entry[DIFFERENCE], "count": 1.0, "largest": entry[LARGEST_DIFFERENCE]})
        for name, value in entry.items():
            if name.startswith(SPEED):
                speeds.append({"step": step, "measure": name.removeprefix(SPEED), "value": float(value)})
            else:
                metrics.append({"step": step, "metric": name, "value": float(value)})
    return (
        Model(ctx.folder / "model", ""),
        pa.Table.from_pylist([policy], schema=POLICIES),
        pa.Table.from_pylist(metrics, schema=METRICS),
        pa.Table.from_pylist(speeds, schema=SPEEDS),
    )


def _final_loss(metrics: pa.Table | None, name: str) -> float:
    """Return the mean of a loss over the last tenth of a run's steps; 0 without a run."""
    if metrics is None:
        return 0.0
    losses = metrics.filter(pc.equal(metrics["metric"], name)).sort_by("step").column("value").to_pylist()
    if not losses:
        raise WinnowError(
            f"the run that is given as an optimum has no metric {name!r}; give it `mix: {{name: joint, weight: ...}}`"
        )
    last = losses[-max(1, round(LAST * len(losses))) :]
    return float(sum(last) / len(last))
