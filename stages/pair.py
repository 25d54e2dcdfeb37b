"""Room 5: which candidate beats which. To add a rule, add a function here."""

from collections.abc import Iterator
from typing import Annotated, Any

import pyarrow as pa

from pipeline import Bound, Registry, Workspace, stage
from schemas import Candidates, Comparisons, Pairs, Selections
from schemas.tables import PAIRS
from stages.groups import by_prompt, column_by

Row = dict[str, Any]
pair_rule = Registry("pair rule")


@pair_rule(reads="comparisons")
def matches(group: list[Row]) -> Iterator[tuple[str, str, float]]:
    """The winner and the loser of every comparison that the ranker made."""
    for match in group:
        winner, loser = match["left_id"], match["right_id"]
        if match["logit"] < 0:
            winner, loser = loser, winner
        yield winner, loser, abs(match["logit"])


@pair_rule(reads="selections")
def neighbours(group: list[Row]) -> Iterator[tuple[str, str, float]]:
    """First-round ranking by the rewards themselves: neighbours in the random order of acceptance."""
    kept = sorted(group, key=lambda row: row["draw"])
    for pair in zip(kept[0::2], kept[1::2], strict=False):
        winner, loser = sorted(pair, key=lambda row: -row["reward"])
        yield winner["candidate_id"], loser["candidate_id"], winner["reward"] - loser["reward"]


@pair_rule(reads="selections")
def best_vs_worst(group: list[Row]) -> Iterator[tuple[str, str, float]]:
    """The highest reward among the kept against the lowest."""
    best, worst = (find(group, key=lambda row: row["reward"]) for find in (max, min))
    if best is not worst:
        yield best["candidate_id"], worst["candidate_id"], best["reward"] - worst["reward"]


def _rule_has_its_table(options: dict[str, Any], wired: frozenset[str]) -> list[str]:
    rule: Bound = options["rule"]
    table = rule.facts["reads"]
    return [] if table in wired else [f"rule {rule.name} reads {table}; wire `{table}` in `from`"]


@stage(version=1, check=_rule_has_its_table)
def pair(
    candidates: Candidates,
    ws: Workspace,
    selections: Selections | None = None,
    comparisons: Comparisons | None = None,
    *,
    rule: Annotated[Bound, pair_rule] = "matches",  # type: ignore[assignment]
) -> Pairs:
    """Ids of winner and loser. Ties and pairs of identical tokens teach nothing: they are left out, with reason."""
    tokens = column_by(candidates, "candidate_id", "token_ids")
    source = comparisons if rule.facts["reads"] == "comparisons" else selections
    rows = []
    for prompt, group in by_prompt(source):
        for winner, loser, gap in rule(group):
            reason = "tie" if gap == 0 else "identical responses" if tokens[winner] == tokens[loser] else None
            if reason:
                ws.reject(reason, place=rule.name, prompt=prompt, candidate=winner, detail=loser)
            else:
                ids = dict(prompt_id=prompt, chosen_id=winner, rejected_id=loser)
                rows.append(ids | dict(gap=float(gap), rule=rule.name))
    return pa.Table.from_pylist(rows, schema=PAIRS)
