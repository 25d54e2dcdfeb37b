"""Data model of the pipeline: the tables (the data dictionary), ids, models, errors, and the check of a table."""

from schemas.check import combine_chunks as combine_chunks
from schemas.check import conform as conform
from schemas.columns import table_name as table_name
from schemas.errors import COMMAND as COMMAND
from schemas.errors import MachineError as MachineError
from schemas.errors import WinnowError as WinnowError
from schemas.errors import WinnowWarning as WinnowWarning
from schemas.ids import candidate_id as candidate_id
from schemas.ids import prompt_id as prompt_id
from schemas.ids import seed_for as seed_for
from schemas.ids import seeds_for as seeds_for
from schemas.ids import shard_of as shard_of
from schemas.ids import split_of as split_of
from schemas.ids import token_digest as token_digest
from schemas.ids import token_digests as token_digests
from schemas.model import Model as Model
from schemas.tables import *  # noqa: F403 - every table, and the annotations that name them
