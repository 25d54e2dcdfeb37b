"""Stage `rescale`: rewards from 0 to 1 over all prompts, which a threshold of ReST filters prompts by."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import StageContext, stage
from schemas import Rewards
from schemas.tables import REWARDS
from stages.data.rows import reject_not_finite


@stage(version=2, unsharded=True)
def rescale(rewards: Rewards, ctx: StageContext) -> Rewards:
    """Compute (r - min) / (max - min) over the rewards of all prompts: 0 worst, 1 best (sec. 4 of arXiv:2308.08998).

    A threshold then says the same of every prompt, and rejects those whose responses are all bad; on the scale `unit`,
    which is of one prompt, each has a best one. Rewards that are all equal are 1, but 0 where they are labels that say
    wrong. A threshold of labels is rescaled with them. Rewards that are not finite are rejected.
    """
    rewards = reject_not_finite(rewards, "reward", ctx, place="rewards")
    if not rewards.num_rows:
        return REWARDS.empty_table()
    bounds = pc.min_max(rewards["reward"]).as_py()
    low, width = bounds["min"], bounds["max"] - bounds["min"]

    def rescaled(values: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.divide(pc.subtract(values, low), width)

    columns = {name: rewards[name] for name in REWARDS.names}
    if width:
        columns |= {name: rescaled(columns[name]) for name in ("reward", "label_threshold")}
    else:
        is_wrong = pc.fill_null(pc.less_equal(rewards["reward"], rewards["label_threshold"]), False)
        has_label, no_threshold = pc.is_valid(rewards["label_threshold"]), pa.scalar(None, pa.float64())
        columns |= {
            "reward": pc.if_else(is_wrong, 0.0, 1.0),
            "label_threshold": pc.if_else(has_label, 0.5, no_threshold),
        }
    return pa.table(columns, schema=REWARDS)
