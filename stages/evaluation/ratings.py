"""Stage `ratings`: people's ratings of a blind sheet (`winnow export --format blind-comparison`), read as a judge's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from annotated_types import MinLen

from pipeline import Columns, DataPath, InputStep, StageContext, stage
from schemas import Candidates, Judgements, Votes, WinnowError
from schemas.tables import JUDGEMENTS, VOTES
from stages.data.file_rows import DELIMITERS, column_names, file_rows
from stages.data.rows import Row

RATINGS = {"1": 1, "2": 2, "same": None}  # what a rater writes -> which response is better
SHEET = ("id", "rating")  # columns that are read, and `rater` where a sheet has it
KEY = ("id", "prompt_id", "candidate_id", "baseline_id", "candidate_is")
LISTED = 20  # mistakes that one refusal shows


@dataclass(frozen=True)
class RatedPair:
    """Line of the key: the pair of responses behind an id, and which of the two the policy's is, 1 or 2."""

    prompt_id: str
    candidate_id: str
    baseline_id: str
    candidate_is: int
    location: str


@dataclass(frozen=True)
class Rating:
    """Line of a sheet. vote: 1 for the policy's response, 0 for the other, 0.5 for neither; None if it is blank."""

    rater: str
    answer: str
    vote: float | None


def check_ratings(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return at plan time all that is wrong with key and sheets."""
    try:
        read_ratings(options["sheets"], options["key"])
    except WinnowError as error:
        return list(error.problems)
    return []


@stage(version=1, unsharded=True, check=check_ratings)
def ratings(
    candidates: Annotated[Candidates, Columns("prompt_id", "k", "candidate_id")],
    baseline: Annotated[Candidates, Columns("prompt_id", "candidate_id")],
    ctx: StageContext,
    *,
    sheets: Annotated[list[DataPath], MinLen(1)],
    key: DataPath,
) -> tuple[Judgements, Votes]:
    """Read the filled sheets of `winnow export --format blind-comparison` (CSV or TSV), and the key beside it.

    A sheet has the columns `id` and `rating`: 1 or 2 for the better response, `same`, or nothing for a pair that was
    not rated. Each sheet is one rater's, unless it has a column `rater`. Ids that the key lacks, ratings of one rater
    of one id twice, and what is none of these values are refused with their lines when the plan is made. Of several
    raters, the verdict is that of the mean of their votes, and one half is a tie; logit log (wins + 1/2) / (losses +
    1/2), `same` being half of each. A pair that nobody rated has no verdict. Pairs of other responses than this run's
    are rejected, and if all are, the sheet is another run's, which ends the stage.
    """
    pairs, by_id = read_ratings(sheets, key)
    k_of = {row["candidate_id"]: row["k"] for row in candidates.to_pylist()}
    opponents = set(baseline.column("candidate_id").to_pylist())
    judgements: list[Row] = []
    votes: list[Row] = []
    for name, pair in pairs.items():
        ids = dict(prompt_id=pair.prompt_id, candidate_id=pair.candidate_id, baseline_id=pair.baseline_id)
        if pair.candidate_id not in k_of or pair.baseline_id not in opponents:
            ctx.reject(
                "rated responses are not this run's", place=pair.location, prompt=pair.prompt_id,
                candidate=pair.candidate_id, detail=f"id {name}",
            )  # fmt: skip
            continue
        rated = by_id.get(name, [])
        values = [rating.vote for rating in rated if rating.vote is not None]
        wins, losses = sum(values), len(values) - sum(values)
        logit = float(np.log(wins + 0.5) - np.log(losses + 0.5)) if values else None  # 0 for as many of both
        judgements.append(ids | dict(k=k_of[pair.candidate_id], logit=logit, unread=None))
        first = "candidate" if pair.candidate_is == 1 else "baseline"
        votes += [ids | dict(voter=item.rater, first=first, answer=item.answer, vote=item.vote) for item in rated]
    if not judgements:
        raise WinnowError(
            f"ratings: no pair of {key.path.name} is of this run's responses: it is another run's key, or this run's "
            "responses were drawn anew since; in a config for several recipes, name the sheets of each under "
            "`recipes: {NAME: {judges: ...}}`"
        )
    rated_votes = sum(vote["vote"] is not None for vote in votes)
    ctx.count(ratings=rated_votes, unrated=sum(row["logit"] is None for row in judgements))
    return pa.Table.from_pylist(judgements, JUDGEMENTS), pa.Table.from_pylist(votes, VOTES)


def read_ratings(sheets: Sequence[DataPath], key: DataPath) -> tuple[dict[str, RatedPair], dict[str, list[Rating]]]:
    """Return the pairs of the key and the ratings of all sheets, by id; raise WinnowError with all mistakes."""
    problems: list[str] = []
    paths = [sheet.path.resolve() for sheet in sheets]
    problems += [f"sheets: {path} is listed twice" for path in dict.fromkeys(paths) if paths.count(path) > 1]
    for path, columns, what in [(key, KEY, "key"), *((sheet, SHEET, "sheets") for sheet in sheets)]:
        if not path.path.is_file() or path.path.suffix not in DELIMITERS:
            problems.append(f"{what}: {path.path}: must be a CSV or TSV file, as the sheet was exported")
        elif lacking := [name for name in columns if name not in column_names(path.path)]:
            cure = (
                "export the sheet anew"
                if what == "key"
                else "the rated sheet has the columns that it was exported with"
            )
            problems.append(f"{what}: {path.path.name} has no column {' and '.join(lacking)}; {cure}")
    if problems:
        raise WinnowError(*problems)

    def refuse(reason: str, *, place: str, detail: str = "") -> None:
        problems.append(f"{place}: {reason} {detail}".rstrip())

    pairs: dict[str, RatedPair] = {}
    for location, row in file_rows(key.path, KEY, refuse):
        name, side = (row["id"] or "").strip(), (row["candidate_is"] or "").strip()
        if not all(row[column] for column in KEY):
            problems.append(f"{location}: a cell of {', '.join(KEY)} is empty; export the sheet anew")
        elif name in pairs:
            problems.append(f"{location}: id {name!r} is in the key twice, first in {pairs[name].location}")
        elif side not in ("1", "2"):
            problems.append(f"{location}: candidate_is is {side!r}, and must be 1 or 2; export the sheet anew")
        else:
            pairs[name] = RatedPair(row["prompt_id"], row["candidate_id"], row["baseline_id"], int(side), location)

    by_id: dict[str, list[Rating]] = {}
    seen: dict[tuple[str, str], str] = {}
    file_names = [sheet.path.name for sheet in sheets]
    for number, sheet in enumerate(sheets, 1):
        title = sheet.path.name if file_names.count(sheet.path.name) == 1 else str(sheet.path)
        for location, row in file_rows(sheet.path, (*SHEET, "rater"), refuse, title):
            name, answer = (row["id"] or "").strip(), (row["rating"] or "").strip()
            rater = (row.get("rater") or "").strip() or str(number)
            value = answer.lower().removesuffix(".0")  # spreadsheets write numbers so
            if name not in pairs:
                problems.append(f"{location}: id {name!r} is not in {key.path.name}: the sheet is of another export")
            elif (rater, name) in seen:
                problems.append(
                    f"{location}: id {name!r} is rated twice by rater {rater}, first in {seen[rater, name]}; remove "
                    "one, or name the raters in a column `rater`"
                )
            elif value and value not in RATINGS:
                problems.append(f"{location}: rating {answer!r} must be 1, 2, same, or empty")
            else:
                seen[rater, name] = location
                better = RATINGS.get(value)
                vote = 0.5 if better is None else float(better == pairs[name].candidate_is)
                by_id.setdefault(name, []).append(Rating(rater, answer, vote if value else None))
    if problems:
        rest = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise WinnowError(*problems[:LISTED], *rest)
    return pairs, by_id
