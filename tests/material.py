"""Examples of random tokens, and what the loop makes of them: for tests that need rows and no text."""

import numpy as np
import pyarrow as pa

from pipeline.context import StageContext, WarmCache
from pipeline.registry import Bound
from schemas.tables import EXAMPLES
from stages.network.forward import logp_of, read_rows
from stages.network.load import load_network
from stages.network.packing import PromptGroup
from stages.training.data import groups_of
from stages.training.objectives import objective
from stages.training.optimize import optimize
from stages.training.terms import ObjectiveTerm

VOCABULARY = range(5, 250)  # ids that the tiny model has, special ones left out


def alone(rows):
    """Each (prompt ids, response ids) as a group of its own."""
    return [PromptGroup(prompt, [response]) for prompt, response in rows]


def bound(registry, name, **options):
    """A registered function with the options given and its own defaults, checked."""
    return registry.bind({"name": name} | options)


def random_rows(seed=0, prompts=6):
    """Rows of `examples`: prompt n has 2 + n % 3 responses, the first of them better than each other one.

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


def imitate(rows, *places):
    """The responses at these places are imitated, with weight 1."""
    for row in rows:
        for place in places:
            row["responses"][place]["weight"] = 1.0
    return rows


def labelled(rows):
    """First responses are desirable, second ones not; as many of the next prompt's responses are read for KL."""
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        row["responses"][0]["desirable"], row["responses"][1]["desirable"] = 1, -1
        row["responses"] += [response(each["candidate_id"], each["token_ids"], desirable=0)
                             for each in other["responses"][:2]]  # fmt: skip
    return rows


def cache(init, rows, spread=0.0, seed=0):
    """Reference log-probs by the tiny model itself, each moved by up to `spread` nats."""
    rng = np.random.default_rng(seed)
    network = load_network(init)
    for row in rows:
        asked = [(row["prompt_ids"], each["token_ids"]) for each in row["responses"]]
        found = read_rows(logp_of, network, asked, "float32", 1)
        for each, logp in zip(row["responses"], found.tolist(), strict=True):
            each["ref_logp"] = float(np.float32(logp + rng.uniform(-spread, spread)))
        row |= {"ref_model": init.digest, "ref_dtype": "float32"}
    return rows


def table(rows):
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


def leg_of(init, rows, name, *, nll_weight=0.0, nll_per="token", tokens_per_pass=60, batch_size=100, seed=0, **options):
    """What `optimize` makes of the rows: small micro-batches, so that a wrong reduction shows."""
    loss = bound(objective, name, **options)
    groups = groups_of(table(rows), loss, nll_weight, init, "float32")
    return ObjectiveTerm(groups, loss, nll_weight, nll_per, batch_size, "float32", tokens_per_pass, seed, 0)


def loss_of(leg, network, batch=None):
    """The loss of one step over all groups, with gradient, and its metrics."""
    batch = leg.groups if batch is None else batch
    panel = leg.panel(batch)
    return sum(leg.losses(network, batch, panel)), panel.entry()


def train(init, rows, folder, *, tell=lambda done, total, unit: None, inputs=None, **options):
    """`optimize` with short defaults: (model, metrics as {(step, name): value}, its row of policies)."""
    given = (
        dict(objective="sigmoid_norm", learning_rate=1e-3, batch_size=4, warmup_ratio=0.0, lr_scheduler_type="constant")
        | options
    )
    if not isinstance(given["objective"], Bound):
        given["objective"] = bound(objective, given["objective"])
    ctx = StageContext(folder, WarmCache(), tell)
    made, policy, metrics, _ = optimize(init, table(rows), ctx, **(inputs or {}), **given)
    values = {(row["step"], row["metric"]): row["value"] for row in metrics.to_pylist()}
    return made, values, policy.to_pylist()[0]
