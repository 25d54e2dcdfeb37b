"""Stage `other_run`: the place of another run's responses in a plan, until a store says which they are."""

from pipeline import stage
from schemas import Candidates, WinnowError


@stage(version=1)
def other_run(*, run: str) -> Candidates:
    """Stand for the responses of a run to the same held-out prompts, of which the store has the key.

    A config's `judges: {NAME: {against: RUN}}` makes such a step. When a command plans with a store, the step becomes
    that of the run itself: nothing is drawn again, and it cannot run.
    """
    raise WinnowError(
        f"other_run: the responses of run {run!r} are gone from the store, or not looked for yet; run it again"
    )
