"""Stage `examples`: one row per prompt with its responses, their weights and reference log-probs, and its pairs.

What the optimizer will see is all in this one table: a method's data recipe ends here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import Bound, Columns, Finite, InputStep, StageContext, stage
from pipeline.costs import Cost
from schemas import Candidates, Examples, Pairs, Prompts, Reference, Selections, WinnowError, token_digests
from schemas.tables import CANDIDATES, EXAMPLES, PAIRS, REFERENCE, SELECTIONS
from stages.data.files import check_demonstrations
from stages.data.rows import (
    ALL_WRONG,
    Ints,
    RejectedRows,
    column_of,
    cutoffs,
    equal_rewards_by_prompt,
    in_order_of_prompts,
    numbers_of,
    positions_of,
    require_ids,
    starts_of_prompts,
)
from stages.options import Split, split_problems
from stages.training.agreement import COMPARABLE
from stages.work import examples_work

RESPONSE = EXAMPLES.field("responses").type.value_type
RESPONSE_COLUMNS = ("prompt_id", "candidate_id", "token_ids", "mask", "logp", "logp_kind", "model", "dtype")
SELECTION_COLUMNS = ("prompt_id", "candidate_id", "draw", "reward", "label_threshold", "weight")
REFERENCE_COLUMNS = ("prompt_id", "candidate_id", "logp", "tokens", "model", "dtype")
Imitate = Literal["nothing", "demonstration", "selected", "best", "chosen", "winner"]
Desirable = Literal["nothing", "pairs", "rewards"]
INPUT_READ_BY = {
    ("imitate", "selected"): "selections",
    ("imitate", "best"): "selections",
    ("imitate", "chosen"): "pairs",
    ("imitate", "winner"): "pairs",
    ("desirable", "pairs"): "pairs",
    ("desirable", "rewards"): "selections",
    ("labels", "soft"): "pairs",
}


def check_examples(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return the reasons why an option has nothing to read, or an input nothing that reads it."""
    imitate, desirable = options["imitate"], options["desirable"]
    problems = [
        f"{name} needs candidates; add `candidates` under `from`"
        for name in ("pairs", "selections", "reference", "mismatched")
        if name in inputs and "candidates" not in inputs
    ]
    problems += split_problems(options, inputs.get("prompts"))
    for (option, value), needed in INPUT_READ_BY.items():
        if options[option] == value and needed not in inputs:
            problems.append(f"{option}: {value} reads {needed}; add `{needed}` under `from`")
    if imitate == "demonstration":
        problems += check_demonstrations(options, inputs)
    if options["threshold"] is not None and desirable != "rewards":
        problems.append("threshold divides rewards; set `desirable: rewards`, or unset it")
    if options["labels"] == "soft" and "pairs" in inputs and inputs["pairs"].stage == "preferences":
        problems.append("labels: soft reads the gap behind a pair, and people's preferences have none; set it to hard")
    if imitate == desirable == "nothing" and "pairs" not in inputs:
        problems.append("neither pairs nor anything to imitate: there is nothing to learn from")
    elif "selections" in inputs and imitate not in ("selected", "best") and desirable != "rewards":
        problems.append(
            "nothing reads selections; set `imitate` or `desirable`, or set `selections: null` under `from`"
        )

    # A selection's weights are lost unless the imitation or the rule that made the pairs carries them on.
    pairs = inputs.get("pairs", InputStep(""))
    rule_of_pairs = pairs.options.get("rule")
    if imitate != "selected" and not (isinstance(rule_of_pairs, Bound) and rule_of_pairs.metadata.get("weighs")):
        sources = (inputs, pairs.inputs, pairs.inputs.get("comparisons", InputStep("")).inputs)
        rules = [tables["selections"].options.get("rule") for tables in sources if "selections" in tables]
        weighing = sorted({rule.name for rule in rules if isinstance(rule, Bound) and rule.metadata.get("weighs")})
        problems += [
            f"nothing reads the weights of {rule}; set `imitate: selected`, or pair by all_pairs" for rule in weighing
        ]
    return problems


@stage(version=4, check=check_examples, cost=Cost(work=examples_work), by_prompt=lambda options: True)
def examples(
    prompts: Annotated[Prompts, Columns("prompt_id", "text", "token_ids", "split", "demonstration_ids")],
    ctx: StageContext,
    candidates: Annotated[Candidates, Columns(*RESPONSE_COLUMNS)] | None = None,
    pairs: Annotated[Pairs, Columns("prompt_id", "chosen_id", "rejected_id", "gap", "weight")] | None = None,
    selections: Annotated[Selections, Columns(*SELECTION_COLUMNS)] | None = None,
    reference: Annotated[Reference, Columns(*REFERENCE_COLUMNS)] | None = None,
    mismatched: Annotated[Candidates, Columns(*RESPONSE_COLUMNS)] | None = None,
    *,
    split: Split = "train",
    imitate: Imitate = "nothing",
    desirable: Desirable = "nothing",
    threshold: Finite | None = None,
    labels: Literal["hard", "soft"] = "hard",
) -> Examples:
    """Join all inputs by prompt to training groups; rows that nothing reads are dropped.

    imitate: whose likelihood counts: a `demonstration`, the `best` by reward, the `winner` of the pairs' tournament and
    those `chosen` in any pair with weight 1, the `selected` with the weights of their selection, but none of a prompt
    whose selected responses are all labelled wrong. desirable:
    unpaired labels, from `pairs` (chosen 1, rejected -1) or from the selected `rewards`, 1 above the `threshold` and -1
    below it; by default it is that of labels (0.5 of 0 and 1, 0 of -1 and 1), and of other rewards their mean per
    prompt, for the sign of a reward says only whether it beats one random draw. labels: what a pair says, 1 or the
    ranker's own probability (the sigmoid of its gap). Raises WinnowError if a reference log-prob is of other tokens
    than those to train on.
    """
    has_candidates, has_reference = candidates is not None, reference is not None
    candidates = CANDIDATES.empty_table() if candidates is None else candidates
    prompts = in_order_of_prompts(prompts.filter(pc.equal(prompts["split"], split)))
    names, rejects = column_of(prompts, "prompt_id"), RejectedRows()
    if (is_twice := pc.equal(names[1:], names[:-1])).true_count:
        raise WinnowError(f"examples: prompt {names[1:].filter(is_twice)[0]} is twice in `prompts`; each has one row")
    # From here on a prompt is its number in order of ids, and rows of other prompts are left out.
    pairs, of_pair = _of_prompts(PAIRS.empty_table() if pairs is None else pairs, names)
    selections, of_selected = _of_prompts(SELECTIONS.empty_table() if selections is None else selections, names)
    reference, _ = _of_prompts(REFERENCE.empty_table() if reference is None else reference, names)
    mismatched, of_mismatched = _of_prompts(CANDIDATES.empty_table() if mismatched is None else mismatched, names)

    # Responses that pairs or selections name, [U] in the table's order, and which of these each row of both names.
    ids = [column_of(pairs, "chosen_id"), column_of(pairs, "rejected_id"), column_of(selections, "candidate_id")]
    positions = positions_of(pa.concat_arrays(ids), candidates["candidate_id"])
    used_rows = np.unique(positions[positions >= 0])
    responses = candidates.take(pa.array(used_rows))
    prompt_of = pc.fill_null(pc.index_in(responses["prompt_id"], value_set=names), -1).to_numpy().astype(np.int64)
    candidate_of = np.where(positions >= 0, np.searchsorted(used_rows, positions), -1)
    belongs = (candidate_of >= 0) & (
        np.append(prompt_of, -1)[candidate_of] == np.concatenate([of_pair, of_pair, of_selected])
    )
    chosen, rejected, selected = np.split(np.where(belongs, candidate_of, -1), [len(of_pair), 2 * len(of_pair)])
    for side, column in ((chosen, ids[0]), (rejected, ids[1])):
        require_ids(column, side)

    # Which of them are imitated, labelled or paired; the others are not read.
    is_used = np.zeros(len(used_rows), dtype=bool)
    is_used[chosen] = is_used[rejected] = True
    weights, signs = np.zeros(len(used_rows)), np.zeros(len(used_rows), dtype=np.int8)
    rewards = numbers_of(selections, "reward")
    _, starts = starts_of_prompts(column_of(selections, "prompt_id"))
    if imitate in ("selected", "best"):
        all_wrong = equal_rewards_by_prompt(selections, starts) == ALL_WRONG
        details = [f"{size} selected, none imitated" for size in np.diff(starts)[all_wrong]]
        wrong_prompts = of_selected[starts[:-1][all_wrong]]
        rejects.add(wrong_prompts, reason=ALL_WRONG, place="selections", detail=details)
        imitated = (selected >= 0) & ~np.repeat(all_wrong, np.diff(starts))
        if imitate == "best":  # the highest reward, the earliest draw on ties
            order = np.lexsort((numbers_of(selections, "draw"), -rewards, of_selected))
            imitated &= np.isin(np.arange(len(order)), order[starts[:-1]])
        weights[selected[imitated]] = 1.0 if imitate == "best" else numbers_of(selections, "weight")[imitated]
        is_used[selected[imitated]] = True
    elif imitate == "chosen":
        weights[chosen] = 1.0
    elif imitate == "winner":
        weights[_winners(chosen, rejected, prompt_of, column_of(responses, "candidate_id"))] = 1.0

    # Unpaired labels, none of a response chosen as often as rejected, or with a reward at the threshold.
    if desirable == "pairs":
        signs[:] = np.sign(np.bincount(chosen, minlength=len(signs)) - np.bincount(rejected, minlength=len(signs)))
    elif desirable == "rewards" and len(rewards):
        levels = cutoffs(rewards, starts, numbers_of(selections, "label_threshold"), threshold)
        level = np.repeat(levels, np.diff(starts))
        at_level = rewards == level
        details = [str(value) for value in level[at_level].tolist()]
        ids_at_level = column_of(selections, "candidate_id").filter(pa.array(at_level))
        reason = "neither above nor below"
        rejects.add(of_selected[at_level], reason=reason, place="selections", candidates=ids_at_level, detail=details)
        labelled = (selected >= 0) & ~at_level
        signs[selected[labelled]] = np.where(rewards > level, 1, -1)[labelled]
        is_used[selected[labelled]] = True

    # Reject prompts that the reference lacks, which that step has rejected.
    has_scores = np.ones(n_prompts := len(names), dtype=bool)
    if has_reference:
        scored = pc.is_in(names, value_set=column_of(reference, "prompt_id")).to_numpy(zero_copy_only=False)
        lacking = (np.bincount(prompt_of[is_used], minlength=n_prompts) > 0) & ~scored
        texts = column_of(prompts, "text").filter(pa.array(lacking))
        rejects.add(np.flatnonzero(lacking), reason="no reference log-prob", place="reference", detail=texts)
        has_scores &= ~lacking
        is_used &= has_scores[prompt_of]

    # All rows of responses: those above, the demonstrations, and other prompts' responses where there is any of these.
    of_used, drawn_by = prompt_of[is_used], responses.filter(pa.array(is_used))
    desirable_labels = pa.array(signs[is_used], mask=signs[is_used] == 0)
    kinds = [_response_rows(drawn_by, of_used, weights[is_used], desirable_labels)]
    if imitate == "demonstration":
        tokens = column_of(prompts, "demonstration_ids")
        has_demonstration = (
            pc.fill_null(pc.greater(pc.list_value_length(tokens), 0), False).to_numpy(False) & has_scores
        )
        numbers = np.flatnonzero(has_demonstration)
        ids = pa.repeat("demonstration", len(numbers))
        demonstrations = pa.table({"candidate_id": ids, "token_ids": tokens.take(pa.array(numbers))})
        no_labels = pa.nulls(len(numbers), pa.int8())
        kinds.append(_response_rows(demonstrations, numbers, np.ones(len(numbers)), no_labels))
    has_rows = np.bincount(np.concatenate([numbers_of(rows, "number") for rows in kinds]), minlength=n_prompts) > 0
    is_borrowed = has_rows[of_mismatched]
    zeros = np.zeros(int(is_borrowed.sum()), dtype=np.int8)
    mismatched = mismatched.filter(pa.array(is_borrowed))
    kinds.append(_response_rows(mismatched, of_mismatched[is_borrowed], zeros, pa.array(zeros)))
    model, dtype = pa.nulls(n_prompts, pa.string()), pa.nulls(n_prompts, pa.string())
    if has_reference:  # which has no demonstrations
        kinds[0], scores = _with_reference(kinds[0], prompts, reference)
        kinds[-1], _ = _with_reference(kinds[-1], prompts, reference)
        firsts = np.full(n_prompts, -1)
        firsts[of_used[::-1]] = np.arange(len(of_used))[::-1]  # the first of each prompt's responses is written last
        rows_of_scores = pa.array(firsts, mask=firsts < 0)
        model, dtype = (column_of(scores, name).take(rows_of_scores) for name in ("model", "dtype"))

    # Reject prompts without a row, but not those of which all candidates were rejected before.
    has_no_rows = has_scores & ~has_rows
    if has_candidates and has_no_rows.any():
        has_no_rows &= pc.is_in(names, value_set=column_of(candidates, "prompt_id")).to_numpy(False)
    texts = column_of(prompts, "text").filter(pa.array(has_no_rows))
    rejects.add(np.flatnonzero(has_no_rows), reason="nothing to learn from", place="prompts", detail=texts)
    rejects.record(ctx, names)

    # Group rows and pairs by prompt, where a pair has its responses' positions in the group.
    rows = pa.concat_tables(kinds)
    n_rows = np.bincount(numbers_of(rows, "number"), minlength=n_prompts)
    order, position = np.argsort(numbers_of(rows, "number"), kind="stable"), np.zeros(rows.num_rows, dtype=np.int64)
    position[order] = np.arange(len(order)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows)
    position_of_used = np.zeros(len(used_rows), dtype=np.int64)
    position_of_used[is_used] = position[: len(of_used)]
    grouped = has_rows[of_pair]  # all but those of a prompt that the reference lacks
    gap = pc.fill_null(column_of(pairs, "gap").cast(pa.float64()), np.inf).to_numpy()  # people's labels have none
    pair_columns = {
        "chosen": position_of_used[chosen],
        "rejected": position_of_used[rejected],
        "weight": numbers_of(pairs, "weight"),
        "label": 1 / (1 + np.exp(-gap)) if labels == "soft" else np.ones(len(gap)),
    }
    pair_rows = pa.table({name: pa.array(column[grouped]) for name, column in pair_columns.items()})
    n_pairs, is_kept = np.bincount(of_pair[grouped], minlength=n_prompts), pa.array(has_rows)
    columns = {
        "prompt_id": names.filter(is_kept),
        "prompt_ids": column_of(prompts, "token_ids").filter(is_kept),
        "responses": _lists("responses", rows.take(pa.array(order)), n_rows[has_rows]),
        "pairs": _lists("pairs", pair_rows, n_pairs[has_rows]),
        "ref_model": model.filter(is_kept),
        "ref_dtype": dtype.filter(is_kept),
    }
    return pa.table(columns)


def _of_prompts(table: pa.Table, names: pa.Array) -> tuple[pa.Table, Ints]:
    """Return a table's rows of these prompts, in order of prompts, and the number of each row's prompt."""
    table = in_order_of_prompts(table)
    numbers = pc.index_in(column_of(table, "prompt_id"), value_set=names)
    if numbers.null_count:
        table, numbers = table.filter(pc.is_valid(numbers)), numbers.drop_null()
    return table, numbers.to_numpy().astype(np.int64)


def _winners(chosen: Ints, rejected: Ints, prompt_of: Ints, names: pa.Array) -> Ints:
    """Return the response of each prompt that was chosen most often of all that were never rejected.

    In a tournament it is its winner; the first by id on ties.
    """
    wins = np.bincount(chosen, minlength=len(names))
    undefeated = np.flatnonzero((wins > 0) & (np.bincount(rejected, minlength=len(names)) == 0))
    rank = np.zeros(len(undefeated), dtype=np.int64)
    rank[pc.sort_indices(names.take(pa.array(undefeated))).to_numpy()] = np.arange(len(undefeated))
    best_first = undefeated[np.lexsort((rank, -wins[undefeated], prompt_of[undefeated]))]
    _, firsts = np.unique(prompt_of[best_first], return_index=True)
    return best_first[firsts]


def _response_rows(table: pa.Table, numbers: Ints, weights: NDArray[Any], desirable: pa.Array) -> pa.Table:
    """Return rows of `candidates` as responses of `examples`, without a reference, and the numbers of their prompts."""
    columns = {
        name: table[name] if name in table.column_names else pa.nulls(table.num_rows, CANDIDATES.field(name).type)
        for name in RESPONSE_COLUMNS
    }
    kind, policy, logp = columns["logp_kind"], columns["model"], columns["logp"]
    # As `draw_of` in stages/training/agreement.py has it.
    is_drawn = pc.and_(pc.is_in(kind, value_set=pa.array(COMPARABLE)), pc.greater(pc.binary_length(policy), 0))
    is_drawn = pc.and_(pc.fill_null(is_drawn, False), pc.is_valid(logp))
    rows = {
        "candidate_id": columns["candidate_id"],
        "token_ids": columns["token_ids"],
        "mask": columns["mask"],
        "weight": pa.array(weights),
        "ref_logp": pa.nulls(table.num_rows, pa.float32()),
        "drawn_logp": pc.if_else(is_drawn, logp, None),
        "drawn_by": pc.if_else(is_drawn, policy, None),
        "drawn_dtype": pc.if_else(is_drawn, columns["dtype"], None),
        "desirable": desirable,
    }
    return pa.table({"number": pa.array(numbers)} | {name: rows[name].cast(RESPONSE.field(name).type) for name in rows})


def _with_reference(rows: pa.Table, prompts: pa.Table, reference: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the rows with their reference log-probs, and the rows of `reference`.

    Raise WinnowError if a log-prob is missing or of other tokens.
    """
    names, numbers = column_of(rows, "candidate_id"), numbers_of(rows, "number")
    positions = positions_of(names, reference["candidate_id"])
    if (positions < 0).any():
        name = names[int((positions < 0).argmax())]
        raise WinnowError(
            f"examples: candidate {name} has no reference log-prob; give `reference` the step that scored it"
        )
    scores = reference.take(pa.array(positions))
    tokens, masks = (column_of(rows, name) for name in ("token_ids", "mask"))
    digests = token_digests(column_of(prompts, "token_ids"), numbers, tokens, masks)
    differs = pc.not_equal(column_of(scores, "tokens"), pa.array(digests, pa.string())).to_numpy(False)
    if differs.any():
        n = int(differs.argmax())
        raise WinnowError(
            f"examples: the reference of candidate {names[n]} (prompt {prompts['prompt_id'][numbers[n]]}) was scored "
            "on other tokens than those to train on: another chat template, tokenizer, truncation or mask; score it "
            "again"
        )
    index = rows.column_names.index("ref_logp")
    return rows.set_column(index, "ref_logp", scores["logp"]), scores


def _lists(name: str, rows: pa.Table, sizes: Ints) -> pa.ListArray:
    """Return rows, grouped by prompt, as a column of `examples`: a list of so many of them per prompt."""
    kind = EXAMPLES.field(name).type
    fields = list(kind.value_type)
    structs = pa.StructArray.from_arrays(
        [column_of(rows, field.name).cast(field.type) for field in fields], fields=fields
    )
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(sizes)), pa.int32()), structs)
