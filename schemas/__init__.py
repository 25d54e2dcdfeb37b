"""Data model of the pipeline: the tables (the data dictionary), ids, models, errors, and the check of a table."""

from schemas.check import conform
from schemas.columns import table_name
from schemas.errors import WinnowError, WinnowWarning
from schemas.ids import candidate_id, prompt_id, seed_for, shard_of, split_of, token_digest
from schemas.model import Model
from schemas.tables import (
    TABLES,
    Candidates,
    Comparisons,
    Evaluations,
    Examples,
    Features,
    Heads,
    Judgements,
    Metrics,
    Outcomes,
    Pairs,
    Policies,
    Prompts,
    Reference,
    Rejects,
    Rewards,
    Selections,
    Speeds,
)

__all__ = [
    "TABLES",
    "Candidates",
    "Comparisons",
    "Evaluations",
    "Examples",
    "Features",
    "Heads",
    "Judgements",
    "Metrics",
    "Model",
    "Outcomes",
    "Pairs",
    "Policies",
    "Prompts",
    "Reference",
    "Rejects",
    "Rewards",
    "Selections",
    "Speeds",
    "WinnowError",
    "WinnowWarning",
    "candidate_id",
    "conform",
    "prompt_id",
    "seed_for",
    "shard_of",
    "split_of",
    "table_name",
    "token_digest",
]
