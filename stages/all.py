"""Modules of all stages, in the order of the pipeline: importing this registers every stage."""

from stages.data import own_candidates, preferences, prompts
from stages.evaluation import evaluate
from stages.head import features
from stages.head import train as head
from stages.network import models
from stages.ranking import combine, compare, judge, ranker_examples, reward, score
from stages.sampling import pool, sample
from stages.selection import pair, select
from stages.training import examples, optimize, reference

__all__ = [
    "combine",
    "compare",
    "evaluate",
    "examples",
    "features",
    "head",
    "judge",
    "models",
    "optimize",
    "own_candidates",
    "pair",
    "pool",
    "preferences",
    "prompts",
    "ranker_examples",
    "reference",
    "reward",
    "sample",
    "score",
    "select",
]
