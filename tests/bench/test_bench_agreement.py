"""Engines and trainer agree on small random models of nine families, and the limits stand apart from what they refuse.

The figures in stages/training/agreement.py are printed here: `pytest -m bench -s tests/bench/test_bench_agreement.py`.
"""

import pytest

from stages.sampling.engines import open_engine
from stages.sampling.sample import sample
from stages.training.agreement import LIMITS, MEASURE
from stages.training.reference import reference
from tests.families import FAMILIES, write_family
from tests.material import context
from tests.stages.test_stages import prompts_of

PROMPTS = prompts_of([f"prompt {n}" for n in range(16)])
EXPLAINED = {"float32": 2e-6, "bfloat16": 1.5e-2}  # nats per token, of draws of some 60 tokens


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_and_trainer_agree(family, engine, tiny, tmp_path):
    policy = write_family(family, tiny, tmp_path / family)
    for dtype in LIMITS:
        ctx = context(tmp_path / dtype)
        candidates = sample(
            PROMPTS, policy, ctx, engine=engine, dtype=dtype, n=4, temperature=1.0, top_k=0, max_tokens=64
        )
        ctx.open_once(open_engine, engine, policy.folder, dtype, 1).close()
        for own in LIMITS:
            reference(PROMPTS, candidates, policy, ctx, dtype=own)
            measured = ctx.measures[MEASURE]
            mean = measured["total"] / measured["count"]
            print(
                f"{family:8} {engine:12} {dtype:8} trainer {own:8} {measured['count']:5.0f} tokens "
                f"mean {mean:.1e} largest {measured['largest']:.1e}"
            )
            assert mean < EXPLAINED["bfloat16" if "bfloat16" in (dtype, own) else "float32"]
