"""Modules of all stages, in the order of the pipeline: importing this one registers every stage."""

# ruff: noqa: F401 - imported for what they register

from stages.data import own_candidates, preferences, prompts
from stages.evaluation import evaluate, other_run, ratings, win_rate
from stages.head import features, train
from stages.network import models
from stages.ranking import autosxs, combine, compare, judge, ranker_examples, rescale, reward, score, verifiers
from stages.sampling import pool, sample
from stages.selection import pair, partition, select
from stages.training import examples, optimize, reference
