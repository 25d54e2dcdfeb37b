"""Stage `examples` on whole columns groups as a plain join does, prompt by prompt."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import WinnowError, conform, token_digest
from schemas.tables import EXAMPLES, PAIRS, PROMPTS, REFERENCE, REJECTS
from stages.data.rows import ALL_WRONG, cutoff, equal_rewards, rows_by_prompt
from stages.training.agreement import draw_of
from stages.training.examples import examples
from tests.stages.selection.test_pair_batches import GROUPS, tables_of
from tests.stages.selection.test_pairs import space
from tests.stages.test_stages import prompts_of

Row = dict[str, Any]


def plain_examples(tables: dict[str, pa.Table | None], options: Row) -> tuple[list[Row], list[Row]]:
    """Return groups and rejects by dicts and loops: a transcription of the stage's docstring."""
    rows: dict[str, dict[str, list[Row]]] = {
        name: {} if table is None else dict(rows_by_prompt(table)) for name, table in tables.items()
    }
    imitate, groups, rejects = options["imitate"], [], []

    def reject(reason: str, place: str, detail: str, prompt: str, candidate: str | None = None) -> None:
        rejects.append(dict(prompt_id=prompt, candidate_id=candidate, place=place, reason=reason, detail=detail))

    for name, (prompt,) in rows["prompts"].items():
        pairs, selected = rows["pairs"].get(name, []), rows["selections"].get(name, [])
        chosen, lost = Counter(pair["chosen_id"] for pair in pairs), {pair["rejected_id"] for pair in pairs}
        weights: dict[str, float] = {}
        if imitate == "selected":
            weights = {row["candidate_id"]: row["weight"] for row in selected}
        elif imitate == "best":
            best = sorted(selected, key=lambda row: (-row["reward"], row["draw"]))[:1]
            weights = {row["candidate_id"]: 1.0 for row in best}
        elif imitate == "chosen":
            weights = dict.fromkeys(chosen, 1.0)
        elif imitate == "winner" and (undefeated := {key: n for key, n in chosen.items() if key not in lost}):
            weights = {min(undefeated, key=lambda key: (-undefeated[key], key)): 1.0}
        if imitate in ("selected", "best") and selected and equal_rewards(selected) == ALL_WRONG:
            reject(ALL_WRONG, "selections", f"{len(selected)} selected, none imitated", name)
            weights = {}
        signs: dict[str, int] = {}
        if options["desirable"] == "pairs":
            votes = Counter(chosen)
            votes.subtract(pair["rejected_id"] for pair in pairs)
            signs = {key: 1 if n > 0 else -1 for key, n in votes.items() if n}
        elif options["desirable"] == "rewards" and selected:
            level = cutoff(selected, options["threshold"])
            for row in selected:
                if row["reward"] == level:
                    reject("neither above nor below", "selections", str(level), name, row["candidate_id"])
                else:
                    signs[row["candidate_id"]] = 1 if row["reward"] > level else -1
        used = {*weights, *signs, *chosen, *lost}
        responses = [row for row in rows["candidates"].get(name, []) if row["candidate_id"] in used]
        scores = {row["candidate_id"]: row for row in rows["reference"].get(name, [])}
        if tables["reference"] is not None and responses and not scores:
            reject("no reference log-prob", "reference", prompt["text"], name)
            continue
        group = []
        for row in responses:
            key = row["candidate_id"]
            item = {"candidate_id": key, "token_ids": row["token_ids"], "mask": row["mask"]}
            item |= {"weight": weights.get(key, 0.0), "desirable": signs.get(key), "ref_logp": None}
            item |= {"ref_logp": scores[key]["logp"]} if scores else {}
            draw = draw_of(row)
            item |= {"drawn_logp": draw and draw.logp, "drawn_by": draw and draw.model}
            group.append(item | {"drawn_dtype": draw and draw.dtype})
        positions = {row["candidate_id"]: n for n, row in enumerate(responses)}
        if imitate == "demonstration" and prompt["demonstration_ids"]:
            ids = {"candidate_id": "demonstration", "token_ids": prompt["demonstration_ids"], "weight": 1.0}
            group.append(ids)
        if not group:
            if name in rows["candidates"]:
                reject("nothing to learn from", "prompts", prompt["text"], name)
            continue
        soft = options["labels"] == "soft"
        pair_rows = [
            {
                "chosen": positions[pair["chosen_id"]],
                "rejected": positions[pair["rejected_id"]],
                "weight": pair["weight"],
                "label": 1 / (1 + np.exp(-pair["gap"])) if soft and pair["gap"] is not None else 1.0,
            }
            for pair in pairs
        ]
        first = scores[responses[0]["candidate_id"]] if scores and responses else {}
        row = {"prompt_id": name, "prompt_ids": prompt["token_ids"], "responses": group, "pairs": pair_rows}
        groups.append(row | {"ref_model": first.get("model"), "ref_dtype": first.get("dtype")})
    return groups, rejects


def reference_of(prompts: pa.Table, candidates: pa.Table, lacking: int) -> pa.Table:
    """Return log-probs of all responses but those of the first prompts."""
    ids = {row["prompt_id"]: row["token_ids"] for row in prompts.to_pylist()[lacking:]}
    rows = [
        {
            "prompt_id": row["prompt_id"],
            "candidate_id": row["candidate_id"],
            "logp": -float(n),
            "n_tokens": len(row["token_ids"]),
            "tokens": token_digest(ids[row["prompt_id"]], row["token_ids"], row["mask"]),
            "model": f"model {n}",
            "dtype": "float32",
        }
        for n, row in enumerate(candidates.to_pylist())
        if row["prompt_id"] in ids
    ]
    return pa.Table.from_pylist(rows, schema=REFERENCE)


OPTIONS = st.fixed_dictionaries({
    "imitate": st.sampled_from(["nothing", "demonstration", "selected", "best", "chosen", "winner"]),
    "desirable": st.sampled_from(["nothing", "pairs", "rewards"]),
    "threshold": st.sampled_from([None, 0.1]),
    "labels": st.sampled_from(["hard", "soft"]),
})  # fmt: skip


@settings(deadline=None)
@given(GROUPS, OPTIONS, st.sampled_from([None, 0, 1]), st.randoms(use_true_random=False))
def test_groups_are_those_of_a_plain_join(groups, options, lacking, order):
    """With and without a reference, which may lack a prompt; ties, equal tokens, no pair, no demonstration."""
    candidates, selections, comparisons = tables_of(groups, order)
    rows = [{**row, "demonstration_ids": order.choice([None, [], [7, 1]])} for row in prompts_of("abcde").to_pylist()]
    rows = [row | {"text": order.choice(["", "x" * 600])} for row in rows]
    prompts = pa.Table.from_pylist(rows, schema=PROMPTS)
    pairs = [
        {"prompt_id": row["prompt_id"], "chosen_id": row["left_id"], "rejected_id": row["right_id"], "weight": 0.5}
        | {"gap": abs(row["logit"]) or None, "rule": "matches"}
        for row in comparisons.to_pylist()
    ]
    tables = {"prompts": prompts, "candidates": candidates, "pairs": pa.Table.from_pylist(pairs, schema=PAIRS)}
    tables |= {"selections": selections}
    tables |= {"reference": None if lacking is None else reference_of(prompts, candidates, lacking)}
    ctx = space()
    result = conform(examples(ctx=ctx, **tables, **options), EXAMPLES)
    expected, rejects = plain_examples(tables, options)
    assert result.to_pylist() == pa.Table.from_pylist(expected, schema=EXAMPLES).to_pylist()
    rejects = [row | {"detail": row["detail"][:500]} for row in rejects]
    assert ctx.rejects == pa.Table.from_pylist(rejects, schema=REJECTS)


def test_a_prompt_that_is_twice_in_prompts_is_refused():
    """Its groups would be trained on twice."""
    prompts = pa.concat_tables([prompts_of("ab"), prompts_of("b")])
    with pytest.raises(WinnowError, match="prompt b is twice"):
        examples(prompts, space(), imitate="demonstration")
