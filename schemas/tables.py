"""The data dictionary: every table that a stage writes, every column with its type, meaning and unit.

Log-probs are natural logarithms, in nats, summed over the tokens of a response, its end-of-sequence token (EOS)
included if the model produced it. Token ids are what every later stage computes on; text is for people and for rankers
with another tokenizer.
"""

from typing import Annotated

import pyarrow as pa

from schemas.columns import column, table, table_name

TOKEN_IDS = pa.list_(pa.int32())
MASK = column(
    "mask",
    pa.list_(pa.bool_()),
    "which token_ids the assistant wrote, in a response of several turns: they alone are trained on, and count in "
    "log-probs, lengths and features; null: all",
    nullable=True,
)
LABEL_THRESHOLD = column(
    "label_threshold",
    pa.float64(),
    "the reward that separates right from wrong where rewards are labels: 0.5 of 0 and 1, 0 of -1 and 1; else null",
    nullable=True,
)
PROMPT_ID = column("prompt_id", pa.string(), "hash of the prompt's content; the same in every table")
CANDIDATE_ID = column("candidate_id", pa.string(), "hash of prompt, tokens and copy number; the same in every table")
K = column("k", pa.int32(), "number of the draw among those of its prompt, from 0")
BASELINE_RESPONSE_ID = column("baseline_id", pa.string(), "candidate_id of the baseline policy's response")

PROMPTS = table(
    "prompts",
    "one row per prompt",
    PROMPT_ID,
    column("text", pa.string(), "the prompt as text, for people and for rankers with their own tokenizer"),
    column(
        "chat",
        pa.string(),
        "its chat messages and tools as JSON; null if it is one text, also for a single user message without tools",
        nullable=True,
    ),
    column("token_ids", TOKEN_IDS, "the prompt as the policy reads it: chat template applied, BOS exactly once"),
    column("rendered", pa.string(), "these ids as text, special tokens included", nullable=True),
    column(
        "split",
        pa.string(),
        "train, heldout or validation, by hash of what users say in lower case, white space as one space",
    ),
    column("demonstration", pa.string(), "a response to imitate; null if the data has none", nullable=True),
    column("demonstration_ids", TOKEN_IDS, "tokens of the demonstration, the one that ends it last", nullable=True),
    column(
        "fields",
        pa.map_(pa.string(), pa.string()),
        "columns of the data file that `keep` names, as text, for programs that score responses; else null",
        nullable=True,
    ),
)
CANDIDATES = table(
    "candidates",
    "one row per response, sampled by a policy or given in a data file",
    PROMPT_ID,
    CANDIDATE_ID,
    K,
    column(
        "token_ids",
        TOKEN_IDS,
        "the sampled ids, never re-tokenised; the one that ends it is last if finish_reason is stop, and those of the "
        "stop string if it is stop_string",
    ),
    MASK,
    column(
        "text",
        pa.string(),
        "the response as text; of a draw without special tokens, what ended it, what the chat template writes before "
        "every answer, white space at its end, and one space before its first word; of a file as it stands there",
    ),
    column(
        "chat",
        pa.string(),
        "its messages as JSON, if they are more than one text of the assistant; else null",
        nullable=True,
    ),
    column(
        "raw_text",
        pa.string(),
        "the response as text, with the special tokens inside it; null if it has none but the one that ends it",
        nullable=True,
    ),
    column(
        "logp",
        pa.float64(),
        "summed log-prob by the engine, nats; never a reference for training",
        nullable=True,
        finite=True,
    ),
    column(
        "logp_kind",
        pa.string(),
        "the distribution that logp is under. exact: the policy's, which the draw came from unchanged; steered: the "
        "policy's plus a head's bonus, which the draw came from unchanged; raw: the policy's, before what changed "
        "the distribution of the draw (temperature, top-k, top-p, penalties, a bias, a bonus); approximate: the "
        "policy's as engine_options compute it (quantization, kv_cache_dtype); none: there is no logp. It counts ids "
        "beyond the tokenizer, of which no candidate has one",
    ),
    column("model", pa.string(), "digest of the weights that drew it; null if none did", nullable=True),
    column("dtype", pa.string(), "arithmetic of the engine that drew it; null if none did", nullable=True),
    column("n_tokens", pa.int32(), "number of token ids"),
    column(
        "finish_reason",
        pa.string(),
        "stop: the model ended it; stop_string: a text of option `stop` ended it; length: it was cut at the limit; "
        "given: it comes from a data file",
    ),
    column("seed", pa.int64(), "random seed of this draw; null if it was not sampled", nullable=True),
)
REWARDS = table(
    "rewards",
    "one row per candidate: its score before selection",
    PROMPT_ID,
    CANDIDATE_ID,
    column(
        "reward",
        pa.float64(),
        "logit of P(candidate beats the prompt's baseline), nats; without a baseline the candidate's own score, or a "
        "weighted sum of several rewards",
    ),
    column(
        "baseline_id",
        pa.string(),
        "candidate_id of the response that all others of the prompt were compared with; null without a baseline",
        nullable=True,
    ),
    column("logit_ab", pa.float64(), "the same logit with the baseline read first", nullable=True),
    column("logit_ba", pa.float64(), "the same logit with the baseline read second", nullable=True),
    column(
        "components",
        pa.map_(pa.string(), pa.float64()),
        "the rewards that this one is a weighted sum of, by name",
        nullable=True,
    ),
    LABEL_THRESHOLD,
)
SELECTIONS = table(
    "selections",
    "one row per selected candidate",
    PROMPT_ID,
    CANDIDATE_ID,
    column("draw", pa.int32(), "order of acceptance, from 0"),
    column("round", pa.int32(), "pass of Algorithm 1 (RSO) in which it was accepted, from 0"),
    column("reward", pa.float64(), "its reward as in `rewards`, before the selection normalised it"),
    LABEL_THRESHOLD,
    column("weight", pa.float64(), "weight if it is imitated; the weight of a pair is the product of its two"),
    column("beta", pa.float64(), "temperature of the prompt's selection, in units of its scale", nullable=True),
    column("acceptance", pa.float64(), "expected share of the prompt's candidates accepted in one pass", nullable=True),
    column("ess", pa.float64(), "effective sample size of the prompt's weights, before clipping", nullable=True),
)
COMPARISONS = table(
    "comparisons",
    "one row per comparison of two selected candidates by the ranker",
    PROMPT_ID,
    column("left_id", pa.string(), "candidate_id of the first"),
    column("right_id", pa.string(), "candidate_id of the second"),
    column("logit", pa.float64(), "logit of P(left beats right), nats, averaged over the orders that were read"),
    column("round", pa.int32(), "round of the tournament, from 0"),
)
PAIRS = table(
    "pairs",
    "one row per preference pair, as candidate ids",
    PROMPT_ID,
    column("chosen_id", pa.string(), "candidate_id of the preferred response"),
    column("rejected_id", pa.string(), "candidate_id of the other response"),
    column("gap", pa.float64(), "reward or logit of chosen minus rejected, nats; null for human labels", nullable=True),
    column("weight", pa.float64(), "weight of the pair in the loss"),
    column("rule", pa.string(), "rule that formed the pair"),
)
REFERENCE = table(
    "reference",
    "one row per response scored by a frozen policy, with the trainer's own forward pass",
    PROMPT_ID,
    CANDIDATE_ID,
    column("logp", pa.float32(), "summed log-prob of the response, nats", finite=True),
    column("n_tokens", pa.int32(), "number of tokens in the sum"),
    column("tokens", pa.string(), "digest of the prompt and response ids that were read, and of the mask"),
    column("model", pa.string(), "digest of the weights that scored it"),
    column("dtype", pa.string(), "arithmetic of the forward pass: float32, or bfloat16 autocast"),
)
EXAMPLES = table(
    "examples",
    "one row per training group: a prompt, its K responses, and pairs as indices into the responses",
    PROMPT_ID,
    column("prompt_ids", TOKEN_IDS, "tokens of the prompt"),
    column(
        "responses",
        pa.list_(
            pa.struct(
                [
                    column("candidate_id", pa.string(), "hash of prompt, tokens and copy number"),
                    column("token_ids", TOKEN_IDS, "tokens of the response"),
                    MASK,
                    column("weight", pa.float32(), "weight of its likelihood term; 0 excludes it from that term"),
                    column("ref_logp", pa.float32(), "cached reference log-prob, nats", nullable=True, finite=True),
                    column(
                        "drawn_logp",
                        pa.float64(),
                        "log-prob under `drawn_by` by the engine that drew it, nats; compared with the trainer's own",
                        nullable=True,
                        finite=True,
                    ),
                    column("drawn_by", pa.string(), "digest of the weights that drew it", nullable=True),
                    column("drawn_dtype", pa.string(), "arithmetic of the engine that drew it", nullable=True),
                    column(
                        "desirable",
                        pa.int8(),
                        "unpaired label, 1 or -1; 0: another prompt's response, read for the KL estimate only; null: "
                        "no label",
                        nullable=True,
                    ),
                ]
            )
        ),
        "the responses of the group",
    ),
    column(
        "pairs",
        pa.list_(
            pa.struct(
                [
                    column("chosen", pa.int32(), "index into responses"),
                    column("rejected", pa.int32(), "index into responses"),
                    column("weight", pa.float32(), "weight of the pair in the loss"),
                    column("label", pa.float32(), "P(chosen is better): 1 for a hard label, else the ranker's"),
                ]
            )
        ),
        "preference pairs among the responses",
    ),
    column("ref_model", pa.string(), "digest of the reference's weights", nullable=True),
    column("ref_dtype", pa.string(), "arithmetic of the reference's forward pass", nullable=True),
)
POLICIES = table(
    "policies",
    "one row per trained model",
    column("init", pa.string(), "digest of the weights that training started from"),
    column("objective", pa.string(), "name and options of the loss"),
    column("parameters", pa.int64(), "number of the policy's weights; a LoRA is merged and adds none"),
    column("steps", pa.int64(), "optimizer steps after which the policy was saved"),
    column("tokens", pa.int64(), "tokens of its data, over these steps: a group's prompt once and each response"),
)
METRICS = table(
    "metrics",
    "one row per metric per training step",
    column("step", pa.int32(), "optimizer steps done so far"),
    column(
        "metric",
        pa.string(),
        "name; prefixed with heldout/ if measured on held-out examples, validation/ on validation prompts",
    ),
    column("value", pa.float64(), "value; losses and log-probs are in nats"),
)
SPEEDS = table(
    "speeds",
    "one row per throughput measure per training step; depends on the machine and differs from run to run",
    column("step", pa.int32(), "optimizer steps done so far"),
    column(
        "measure",
        pa.string(),
        "pairs_per_second, tokens_per_second, tokens/read, tokens/saved (a share), peak_memory_gb, mfu (model FLOPs "
        "utilisation), and the settings they were measured with: tokens_per_pass, gradient_checkpointing, world_size",
    ),
    column(
        "value",
        pa.float64(),
        "value. Memory: the maximum that the GPU held since training began, or without a GPU the process's maximum "
        "resident set; the largest over all processes. mfu: share of the GPUs' bf16 peak",
    ),
)
FEATURES = table(
    "features",
    "one row per response: its features under a frozen policy",
    PROMPT_ID,
    CANDIDATE_ID,
    column("features", pa.list_(pa.float32()), "last hidden states of the policy, averaged over the response's tokens"),
)
PARTITIONS = table(
    "partitions",
    "one row per prompt: its partition function, learned as a function of the prompt",
    PROMPT_ID,
    column("log_z", pa.float64(), "log of the mean of exp(reward / beta) over the policy's responses, nats"),
)
HEADS = table(
    "heads",
    "one row per neuron of a preference head: score = sum over neurons of outer * max(0, inner . features + bias)",
    column("neuron", pa.int32(), "number of the neuron, from 0"),
    column("inner", pa.list_(pa.float64()), "weights of the features"),
    column("bias", pa.float64(), "added before the ReLU"),
    column("outer", pa.float64(), "weight of the ReLU's output"),
)
JUDGEMENTS = table(
    "judgements",
    "one row per held-out response of a policy and response of the baseline policy to the same prompt",
    PROMPT_ID,
    K,
    CANDIDATE_ID,
    BASELINE_RESPONSE_ID,
    column(
        "logit",
        pa.float64(),
        "the ranker's logit of P(candidate beats baseline), nats, mean of both orders; null if it gave no verdict",
        nullable=True,
    ),
    column(
        "unread",
        pa.string(),
        "candidate, baseline or both: whose response the ranker could not read, or the longer of two that did not fit "
        "its context together; null if it read both",
        nullable=True,
    ),
)
VOTES = table(
    "votes",
    "one row per vote of a judge that is asked several times, a model or people, on two responses to a prompt",
    PROMPT_ID,
    CANDIDATE_ID,
    BASELINE_RESPONSE_ID,
    column("voter", pa.string(), "who voted: the number of a model's sample, from 0, or the name of a rater"),
    column("first", pa.string(), "candidate or baseline: whose response was shown first"),
    column("answer", pa.string(), "what was answered, in full"),
    column(
        "vote",
        pa.float64(),
        "1 for the candidate, 0 for the baseline, 0.5 for neither; null if the answer says none of them",
        nullable=True,
    ),
)
OUTCOMES = table(
    "outcomes",
    "one row per held-out response of a policy",
    PROMPT_ID,
    K,
    CANDIDATE_ID,
    column(
        "proxy_win",
        pa.float64(),
        "share of the baseline's responses that it beats by the ranker, a tie being half; a response that the ranker "
        "cannot read loses to one that it can; null without a verdict",
        nullable=True,
    ),
    column(
        "gold_win",
        pa.float64(),
        "share of the baseline's responses that it beats by the gold reward, a tie being half",
        nullable=True,
    ),
    column("gold", pa.float64(), "gold reward of the response", nullable=True),
    column("gold_baseline", pa.float64(), "mean gold reward of the baseline's responses to the prompt", nullable=True),
    column(
        "kl",
        pa.float64(),
        "log-prob under the distribution it was sampled from minus log-prob under the baseline policy, nats; the "
        "mean estimates the KL divergence",
        nullable=True,
        finite=True,
    ),
    column("n_tokens", pa.int32(), "number of tokens of the response"),
)
WINS = table(
    "wins",
    "one row per held-out response of a policy and judge of `judges`, against one opponent",
    PROMPT_ID,
    K,
    CANDIDATE_ID,
    column("judge", pa.string(), "name of the judge in the config"),
    column("against", pa.string(), "whose responses it is compared with: sft, target, or a run"),
    column(
        "win",
        pa.float64(),
        "share of the opponent's responses that it beats, a tie being half; a response that the judge cannot read "
        "loses to one that it can; null without a verdict",
        nullable=True,
    ),
    column("comparisons", pa.int32(), "opponent's responses that it was compared with"),
    column("ties", pa.int32(), "comparisons in which neither is better"),
    column("undecided", pa.int32(), "comparisons without a verdict, which count in no win rate"),
    column("unread", pa.int32(), "comparisons with a response that the judge cannot read: of two, no verdict"),
)
EVALUATIONS = table(
    "evaluations",
    "one row per metric of an evaluated policy",
    column("metric", pa.string(), "name"),
    column("value", pa.float64(), "mean over prompts"),
    column("low", pa.float64(), "lower end of the bootstrap confidence interval over prompts"),
    column("high", pa.float64(), "upper end of the bootstrap confidence interval over prompts"),
    column("n", pa.int64(), "number of prompts that have the metric"),
)
REJECTS = table(
    "rejects",
    "one row per input row that a stage dropped",
    column("prompt_id", pa.string(), "hash of the prompt's content; null if it has none", nullable=True),
    column("candidate_id", pa.string(), "the candidate; null if a whole prompt or line was dropped", nullable=True),
    column("place", pa.string(), "where the row was, such as a line of the input file"),
    column("reason", pa.string(), "short reason, the same text for all rows dropped for it, so that it can be counted"),
    column("detail", pa.string(), "the value that caused the reject"),
)

# All of the above, in the order in which a prompt passes through them: the order of lists, pages and manifests.
TABLES: dict[str, pa.Schema] = {table_name(item): item for item in globals().values() if isinstance(item, pa.Schema)}

# Annotations of a stage's inputs and outputs: `def rank(candidates: Candidates) -> Rewards`.
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
Partitions = Annotated[pa.Table, PARTITIONS]
Heads = Annotated[pa.Table, HEADS]
Judgements = Annotated[pa.Table, JUDGEMENTS]
Votes = Annotated[pa.Table, VOTES]
Outcomes = Annotated[pa.Table, OUTCOMES]
Wins = Annotated[pa.Table, WINS]
Evaluations = Annotated[pa.Table, EVALUATIONS]
Rejects = Annotated[pa.Table, REJECTS]
