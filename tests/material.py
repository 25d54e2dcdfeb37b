"""Examples of random tokens, and short calls of training: for tests that need rows and no text."""

from dataclasses import fields
from inspect import signature

import numpy as np
import pyarrow as pa
from safetensors.torch import load_file

from pipeline.context import StageContext, WarmCache
from pipeline.registry import Bound
from schemas.tables import EXAMPLES
from stages.network.forward import forward_rows, logp_of
from stages.network.load import load_network
from stages.network.packing import PromptGroup
from stages.training.config import TermData, TrainConfig
from stages.training.objectives import objective
from stages.training.optimize import optimize
from stages.training.terms import ObjectiveTerm, StepMetrics

VOCABULARY = range(5, 250)  # ids that the tiny model has, without special ones


def no_progress(done, total, unit, figures=None):
    pass


def context(folder="unused", report_progress=no_progress):
    return StageContext(folder, WarmCache(), report_progress)


def bound(registry, name, **options):
    """Return a registered function with these options and its own defaults, checked."""
    return registry.bind({"name": name} | options)


def alone(rows):
    """Return each (prompt ids, response ids) as a group."""
    return [PromptGroup(prompt, [response]) for prompt, response in rows]


# Rows of `examples`


def random_rows(seed=0, prompts=6):
    """Return rows of `examples`: prompt n has 2 + n % 3 responses, the first of them better than each other one.

    Nothing is imitated, labelled, mismatched or cached yet.
    """
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.choice(VOCABULARY, rng.integers(low, high)).tolist()

    return [
        {
            "prompt_id": f"p{n}",
            "prompt_ids": [0, *ids(2, 9)],
            "responses": [response(f"c{n}{m}", ids(2, 12)) for m in range(2 + n % 3)],
            "pairs": [{"chosen": 0, "rejected": m, "weight": 1.0, "label": 1.0} for m in range(1, 2 + n % 3)],
            "ref_model": None,
            "ref_dtype": None,
        }
        for n in range(prompts)
    ]


def response(name, ids, **fields):
    return {"candidate_id": name, "token_ids": ids, "weight": 0.0, "ref_logp": None, "desirable": None} | fields


def responses_of(rows):
    """Return (prompt ids, response ids) of every response, in order."""
    return [(row["prompt_ids"], response["token_ids"]) for row in rows for response in row["responses"]]


def imitate(rows, *indices):
    """Let the responses at these indices be imitated, with weight 1."""
    for row in rows:
        for index in indices:
            row["responses"][index]["weight"] = 1.0
    return rows


def labelled(rows):
    """Label first responses desirable, second ones not; add as many of the next prompt's responses, for KL."""
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        row["responses"][0]["desirable"], row["responses"][1]["desirable"] = 1, -1
        row["responses"] += [
            response(mismatched["candidate_id"], mismatched["token_ids"], desirable=0)
            for mismatched in other["responses"][:2]
        ]
    return rows


def cache(init, rows, spread=0.0, seed=0):
    """Add reference log-probs by `init` itself, each moved by up to `spread` nats."""
    rng = np.random.default_rng(seed)
    network = load_network(init)
    for row in rows:
        scores = forward_rows(logp_of, network, responses_of([row]), "float32", 1)
        for answer, logp in zip(row["responses"], scores.tolist(), strict=True):
            answer["ref_logp"] = float(np.float32(logp + rng.uniform(-spread, spread)))
        row |= {"ref_model": init.digest, "ref_dtype": "float32"}
    return rows


def table(rows):
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


# Training


def term_of(
    init, rows, name, *, nll_weight=0.0, nll_per="token", tokens_per_pass=60, batch_size=100, seed=0, index=0, **options
):
    """Return the loss term that `optimize` makes of the rows: small micro-batches, so that a wrong reduction shows."""
    data = TermData(table(rows), None, bound(objective, name, **options), nll_weight)
    config = config_of(nll_per=nll_per, tokens_per_pass=tokens_per_pass, batch_size=batch_size, seed=seed)
    return ObjectiveTerm(data, init, config, index)


def config_of(**options):
    """Return the options of `optimize` with its own defaults."""
    defaults = {name: option.default for name, option in signature(optimize).parameters.items()}
    return TrainConfig(
        **{option.name: options.get(option.name, defaults[option.name]) for option in fields(TrainConfig)}
    )


def loss_of(term, network, batch=None):
    """Return the loss of one step over all groups (or a batch of them), with gradient, and its metrics."""
    batch = term.groups if batch is None else batch
    metrics = StepMetrics(batch, term.nll_per)
    return sum(term.micro_batch_losses(network, batch, metrics)), metrics.means()


def run_optimize(init, rows, folder, *, report_progress=no_progress, inputs=None, **options):
    """Call `optimize` with short defaults; rows are a list or a table of examples."""
    defaults = dict(objective="sigmoid_norm", learning_rate=1e-3, batch_size=4, warmup_ratio=0.0)
    options = defaults | dict(lr_scheduler_type="constant") | options
    if not isinstance(options["objective"], Bound):
        options["objective"] = bound(objective, options["objective"])
    examples = rows if isinstance(rows, pa.Table) else table(rows)
    return optimize(init, examples, context(folder, report_progress), **(inputs or {}), **options)


def train(init, rows, folder, **options):
    """Return the model, metrics as {(step, name): value}, and the row of policies of `run_optimize`."""
    model, policy, metrics, _ = run_optimize(init, rows, folder, **options)
    values = {(row["step"], row["metric"]): row["value"] for row in metrics.to_pylist()}
    return model, values, policy.to_pylist()[0]


def train_speeds(init, rows, folder, **options):
    """Return the model and {measure: [value per step]} of `run_optimize`."""
    model, _, _, speeds = run_optimize(init, rows, folder, **options)
    values: dict = {}
    for row in speeds.to_pylist():
        values.setdefault(row["measure"], []).append(row["value"])
    return model, values


def interrupt_at(step):
    """Return a `progress` that ends the run after this step, as Ctrl-C does."""

    def report_progress(done, total, unit, figures=None):
        if done == step:
            raise KeyboardInterrupt

    return report_progress


def weights_of(model):
    """Return a saved model's tensors by name."""
    return {name: value for file in model.folder.glob("*.safetensors") for name, value in load_file(file).items()}


def largest_difference(a, b):
    """Return the largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def relative_difference(a, b, start):
    """Return |a - b| / |b - start|: how far apart two trainings from `start` ended, against how far they went.

    AdamW divides an element's gradient by its own size, so where a gradient is rounding noise, another order of sums
    may change that element by any fraction of a step. Norms are not ruled by one such element of a hundred thousand.
    """
    assert a.keys() == b.keys() == start.keys()
    apart = sum(float((a[name] - b[name]).square().sum()) for name in a)
    moved = sum(float((b[name] - start[name]).square().sum()) for name in a)
    return (apart / moved) ** 0.5
