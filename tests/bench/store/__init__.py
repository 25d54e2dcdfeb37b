"""Stores at the size of real runs: what `select`, a rerun, a changed beta, SQL and `sample` take, and 100 kills."""

from dataclasses import dataclass

PARTS = "sample,workers,select,beta,rerun,sql,kills"


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured; smaller ones give a first look."""

    prompts: int = 1_000_000  # of the tables, each with 64 candidates
    steps: int = 1000  # in the store of the rerun
    parts: int = 64  # of each step
    sampled: int = 192  # prompts, each with 64 draws of 32 tokens
    hidden: int = 256  # of the model that samples
    kills: int = 100
    repeats: int = 3
