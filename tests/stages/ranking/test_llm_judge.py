"""An LLM judge whose own question holds a mark of its model."""

import pytest

from schemas import WinnowError
from stages.ranking.rankers import open_ranker, ranker


def test_a_template_with_a_special_token_is_refused_when_the_judge_is_opened(tiny):
    """Every question would be refused as text that holds a control token, as if no response fitted."""
    with pytest.raises(WinnowError, match=r"special token \[RESPONSE A\].*by\.template"):
        open_ranker(ranker.bind({"name": "llm_judge", "engine": "transformers"}), tiny)
