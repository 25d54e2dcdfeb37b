"""The data dictionary: every table a stage writes, every column with its meaning and unit.

Log-probs are natural logarithms, in nats, summed over a response's tokens (its end-of-sequence token
included when the model produced it). Token ids travel; text is for people.
"""

from typing import Annotated

import pyarrow as pa

TABLES: dict[str, pa.Schema] = {}
IDS = pa.list_(pa.int32())


def column(name: str, kind: pa.DataType, meaning: str, *, null: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=null, metadata={"meaning": meaning})


def described(name: str, about: str, *columns: pa.Field) -> pa.Schema:
    return pa.schema(columns, metadata={"table": name, "about": about})


def table(name: str, about: str, *columns: pa.Field) -> pa.Schema:
    TABLES[name] = described(name, about, *columns)
    return TABLES[name]


def table_name(schema: pa.Schema) -> str:
    return str(schema.metadata[b"table"].decode())


PROMPT_ID = column("prompt_id", pa.string(), "hash of the prompt's content; joins every table")
CANDIDATE_ID = column("candidate_id", pa.string(), "hash of prompt, tokens and copy; joins every table")
K = column("k", pa.int32(), "which draw of this prompt, from 0")

PROMPTS = table(
    "prompts",
    "one row a prompt",
    PROMPT_ID,
    column("text", pa.string(), "the prompt for people (and for rankers, which have their own tokenizer)"),
    column("token_ids", IDS, "the prompt as the policy reads it: chat template applied, BOS exactly once"),
    column("split", pa.string(), "train or heldout, by hash of the prompt id"),
    column("demonstration", pa.string(), "a response to imitate, if the data has one", null=True),
    column("demonstration_ids", IDS, "its tokens, EOS last", null=True),
)
CANDIDATES = table(
    "candidates",
    "one row a response, sampled or brought along",
    PROMPT_ID,
    CANDIDATE_ID,
    K,
    column("token_ids", IDS, "the sampled ids themselves, never re-tokenised; EOS last if finish_reason is stop"),
    column("text", pa.string(), "the response for people, special tokens left out"),
    column("logp", pa.float64(), "the engine's summed log-prob, nats; never a reference for training", null=True),
    column(
        "logp_kind",
        pa.string(),
        "of which law logp is. exact: the policy's, drawn from as it is; steered: the policy's with a head's bonus, "
        "drawn from as it is; raw: the policy's, before the temperature, top-k or bonus of the draw; none",
    ),
    column("n_tokens", pa.int32(), "number of token ids"),
    column("finish_reason", pa.string(), "stop: the model ended it; length: it was cut; given: nobody drew it"),
    column("seed", pa.int64(), "the seed of this draw", null=True),
)
REWARDS = table(
    "rewards",
    "one row a candidate: how good, before selection",
    PROMPT_ID,
    CANDIDATE_ID,
    column(
        "reward",
        pa.float64(),
        "logit P(candidate beats the prompt's baseline), nats; without a baseline its own score, or a sum of several",
    ),
    column("baseline_id", pa.string(), "the candidate that all others were compared with, if any were", null=True),
    column("logit_ab", pa.float64(), "the same logit with the baseline read first", null=True),
    column("logit_ba", pa.float64(), "the same logit with the baseline read second", null=True),
    column("components", pa.map_(pa.string(), pa.float64()), "the rewards that it is a weighted sum of", null=True),
)
SELECTIONS = table(
    "selections",
    "one row a kept candidate",
    PROMPT_ID,
    CANDIDATE_ID,
    column("draw", pa.int32(), "order of acceptance, from 0"),
    column("round", pa.int32(), "pass of Algorithm 1 in which it was accepted, from 0"),
    column("reward", pa.float64(), "its reward as it came, whatever scale the selection used"),
    column("weight", pa.float64(), "likelihood weight if it is imitated; a pair weighs the product of its two"),
    column("beta", pa.float64(), "temperature of the prompt's selection, in units of its scale", null=True),
    column("acceptance", pa.float64(), "expected share of the prompt's candidates accepted at once", null=True),
    column("ess", pa.float64(), "effective sample size of the prompt's weights, before any clip", null=True),
)
COMPARISONS = table(
    "comparisons",
    "one row a call of the ranker on two selected candidates",
    PROMPT_ID,
    column("left_id", pa.string(), "candidate"),
    column("right_id", pa.string(), "candidate"),
    column("logit", pa.float64(), "logit P(left beats right), averaged over the orders read, nats"),
    column("round", pa.int32(), "round of the tournament, from 0"),
)
PAIRS = table(
    "pairs",
    "one row a preference, as ids",
    PROMPT_ID,
    column("chosen_id", pa.string(), "the candidate preferred"),
    column("rejected_id", pa.string(), "the other"),
    column("gap", pa.float64(), "logit or reward difference behind it, nats; null for human labels", null=True),
    column("weight", pa.float64(), "how much the pair counts in its objective"),
    column("rule", pa.string(), "what made the pair"),
)
REFERENCE = table(
    "reference",
    "one row a response scored by a frozen policy, with the trainer's own forward",
    PROMPT_ID,
    CANDIDATE_ID,
    column("logp", pa.float32(), "summed log-prob, fp32, nats"),
    column("n_tokens", pa.int32(), "how many tokens the sum has"),
    column("tokens", pa.string(), "digest of the prompt and response ids that were read"),
    column("model", pa.string(), "digest of the weights that read them"),
    column("dtype", pa.string(), "float32, or bfloat16 autocast"),
)
EXAMPLES = table(
    "examples",
    "one row a training group: a prompt, its K responses, and pairs as indices into them",
    PROMPT_ID,
    column("prompt_ids", IDS, "prompt tokens"),
    column(
        "responses",
        pa.list_(
            pa.struct(
                [
                    column("candidate_id", pa.string(), "which response"),
                    column("token_ids", IDS, "its tokens"),
                    column("weight", pa.float32(), "weight of its likelihood term; 0 keeps it out of that term"),
                    column("ref_logp", pa.float32(), "cached reference log-prob, nats", null=True),
                    column(
                        "desirable",
                        pa.int8(),
                        "1 or -1: an unpaired label; 0: another prompt's response, read for KL alone; null: none",
                        null=True,
                    ),
                ]
            )
        ),
        "the group's responses",
    ),
    column(
        "pairs",
        pa.list_(
            pa.struct(
                [
                    column("chosen", pa.int32(), "index into responses"),
                    column("rejected", pa.int32(), "index into responses"),
                    column("weight", pa.float32(), "how much the pair counts"),
                    column("label", pa.float32(), "P(chosen is the better one): 1, or the ranker's own"),
                ]
            )
        ),
        "preferences among them",
    ),
    column("ref_model", pa.string(), "digest of the reference's weights", null=True),
    column("ref_dtype", pa.string(), "arithmetic of the reference", null=True),
)
POLICIES = table(
    "policies",
    "one row a trained model",
    column("init", pa.string(), "digest of the weights that it started from"),
    column("objective", pa.string(), "name and options of the loss"),
    column("parameters", pa.int64(), "number of the policy's weights; a LoRA is merged and adds none"),
    column("steps", pa.int64(), "optimizer steps"),
    column("tokens", pa.int64(), "tokens of its data: of each step, each prompt once and each of its responses"),
)
METRICS = table(
    "metrics",
    "one row a metric a training step",
    column("step", pa.int32(), "optimizer steps done"),
    column("metric", pa.string(), "name; heldout/ before those on held-out examples"),
    column("value", pa.float64(), "value; nats where it is a loss or a log-prob"),
)
SPEEDS = table(
    "speeds",
    "one row a measure a training step: what the machine did, which is not the same twice",
    column("step", pa.int32(), "optimizer steps done"),
    column(
        "measure",
        pa.string(),
        "pairs_per_second, tokens_per_second, tokens/read, tokens/saved (a share), peak_memory_gb, flop_utilisation, "
        "and what it was made with: tokens_per_pass, gradient_checkpointing, world_size",
    ),
    column(
        "value",
        pa.float64(),
        "value; memory: the most that the GPU held since the run began, or on a CPU the process since it began (its "
        "resident set); of several ranks the largest; flops: a share of the GPUs' bf16 peak",
    ),
)
FEATURES = table(
    "features",
    "one row a response as a frozen policy sees it",
    PROMPT_ID,
    CANDIDATE_ID,
    column("features", pa.list_(pa.float32()), "mean of its tokens' last hidden states"),
)
HEADS = table(
    "heads",
    "one row a neuron of a preference head: score = sum of outer * max(0, inner . features + bias)",
    column("neuron", pa.int32(), "number, from 0"),
    column("inner", pa.list_(pa.float64()), "weights of the features"),
    column("bias", pa.float64(), "added before the ramp"),
    column("outer", pa.float64(), "weight of the ramp"),
)
JUDGEMENTS = table(
    "judgements",
    "one row a held-out response of a policy beside the baseline policy's response of the same k",
    PROMPT_ID,
    K,
    CANDIDATE_ID,
    column("baseline_id", pa.string(), "the baseline policy's response"),
    column("logit", pa.float64(), "proxy: logit P(candidate beats baseline), both orders averaged, nats"),
)
OUTCOMES = table(
    "outcomes",
    "one row a judged held-out response",
    PROMPT_ID,
    K,
    CANDIDATE_ID,
    column("baseline_id", pa.string(), "the baseline policy's response"),
    column("proxy_win", pa.float64(), "1, 0, or one half for a tie, by the ranker"),
    column("gold_win", pa.float64(), "1, 0, or one half for a tie, by the gold reward", null=True),
    column("gold", pa.float64(), "gold reward of the response", null=True),
    column("gold_baseline", pa.float64(), "gold reward of the baseline's response", null=True),
    column("kl", pa.float64(), "log-prob under what drew it minus under the baseline, nats; mean = KL", null=True),
    column("n_tokens", pa.int32(), "length of the response"),
)
EVALUATIONS = table(
    "evaluations",
    "one row a metric of a policy",
    column("metric", pa.string(), "name"),
    column("value", pa.float64(), "mean over prompts"),
    column("low", pa.float64(), "lower end of the bootstrap interval over prompts"),
    column("high", pa.float64(), "upper end"),
    column("n", pa.int64(), "prompts behind it"),
)
REJECTS = table(
    "rejects",
    "one row for each row that a stage left out",
    column("prompt_id", pa.string(), "the prompt, where known", null=True),
    column("candidate_id", pa.string(), "the candidate, where known", null=True),
    column("place", pa.string(), "where it stood, e.g. a line of the input file"),
    column("reason", pa.string(), "short and countable"),
    column("detail", pa.string(), "the value that was at fault"),
)

Prompts = Annotated[pa.Table, PROMPTS]
Candidates = Annotated[pa.Table, CANDIDATES]
Rewards = Annotated[pa.Table, REWARDS]
Selections = Annotated[pa.Table, SELECTIONS]
Comparisons = Annotated[pa.Table, COMPARISONS]
Pairs = Annotated[pa.Table, PAIRS]
Reference = Annotated[pa.Table, REFERENCE]
Examples = Annotated[pa.Table, EXAMPLES]
Policies = Annotated[pa.Table, POLICIES]
Metrics = Annotated[pa.Table, METRICS]
Speeds = Annotated[pa.Table, SPEEDS]
Features = Annotated[pa.Table, FEATURES]
Heads = Annotated[pa.Table, HEADS]
Judgements = Annotated[pa.Table, JUDGEMENTS]
Outcomes = Annotated[pa.Table, OUTCOMES]
Evaluations = Annotated[pa.Table, EVALUATIONS]
Rejects = Annotated[pa.Table, REJECTS]
