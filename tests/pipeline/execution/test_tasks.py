"""Results of tasks that are refused."""

import pytest

from pipeline.execution.tasks import check_not_empty
from schemas import WinnowError


@pytest.mark.parametrize(
    ("split", "share"), [("heldout", "heldout"), ("train", "heldout"), ("validation", "validation")]
)
def test_a_table_without_rows_names_the_share_of_its_split(split, share):
    manifest = {"rows": {"candidates": 0}, "model": None, "rejects": {}}
    with pytest.raises(WinnowError, match=f"no rows of split {split}: see `{share}` of the data"):
        check_not_empty("sample", {"split": split}, manifest)


def test_a_table_that_the_options_leave_out_may_be_empty_and_no_other():
    """Whether rows were rejected or not: candidates without scores have no rewards, and must have candidates."""
    for rejects in ({}, {"empty response": 1}):
        manifest = {"rows": {"candidates": 2, "rewards": 0}, "model": None, "rejects": rejects}
        check_not_empty("completions", {}, manifest, omitted=["rewards"])
        manifest["rows"]["candidates"] = 0
        with pytest.raises(WinnowError, match=r"completions: (every row of )?candidates "):
            check_not_empty("completions", {}, manifest, omitted=["rewards"])
