"""vLLM behind the seam."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

from stages.limits import context_length
from stages.sampling.engines import Completion, Progress, Request, Sampling, ignore_progress
from stages.sampling.engines.batch import Batch

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; must be set on a CPU
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the process trains afterwards: leave its threads alone
}
SEQUENCES = 512  # that run at once; as many again stand by, so that none who ends leaves a gap
BATCHED_TOKENS = 16_384  # a step's tokens on a CPU; at least one whole prompt must fit, whatever the context


class VllmEngine:
    """One request a draw, each with its own seed, so that more draws later are a pure extension."""

    def __init__(self, folder: Path, dtype: str, tensor_parallel: int = 1) -> None:
        import torch

        from stages.network.load import THREADS

        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            # In this process: up in seconds. On a GPU a subprocess, whose end gives the memory back.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        torch.set_num_threads(THREADS)
        with _hidden("llvmlite.binding.ffi"), _quiet():
            from vllm import LLM

            self.llm: Any = LLM(
                model=str(folder),
                dtype=dtype,
                seed=0,
                tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="uni" if tensor_parallel == 1 else "mp",
                skip_tokenizer_init=True,
                enforce_eager=on_cpu,
                logprobs_mode="raw_logprobs",
                max_num_seqs=SEQUENCES,
                max_num_batched_tokens=max(BATCHED_TOKENS, context_length(folder)) if on_cpu else None,
                enable_chunked_prefill=False if on_cpu else None,  # a split prompt rewinds a seed; CPU seeds cannot
                disable_log_stats=True,
                generation_config="vllm",  # the folder's own sampling defaults would change the law
            )
        _end_waits(self.llm.llm_engine.engine_core)
        self.batch = Batch(_Core(self.llm.llm_engine), window=2 * SEQUENCES)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = ignore_progress
    ) -> list[Completion]:
        return self.batch.generate(requests, sampling, progress)

    def close(self) -> None:
        """Frees the weights and the KV cache; vLLM keeps both until its engine core is shut down."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.batch
        cleanup_dist_env_and_memory()
        gc.collect()


class _Core:
    """What `LLM.generate` does between its arguments and its list, in pieces; of an `LLMEngine`, untyped as vLLM is."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.parameters = lru_cache(_parameters)  # of one engine: its folder's stops join a set that copies share

    def add(self, name: str, request: Request, sampling: Sampling) -> None:
        from vllm.inputs import tokens_input

        own = copy(self.parameters(sampling))
        own.seed = request.seed
        self.engine.add_request(name, tokens_input(list(request.prompt_ids)), own)

    def step(self) -> dict[str, Completion]:
        return {answer.request_id: _completion(answer) for answer in self.engine.step() if answer.finished}

    def abort(self, names: list[str]) -> None:
        self.engine.abort_request(names)


def _end_waits(client: Any) -> None:
    """Where the engine is a process of its own and is killed, vLLM 0.32 would wait for its next answer for ever."""
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    def last_word(reader: Thread, answers: Any) -> None:
        reader.join()
        answers.put(EngineDeadError())

    if isinstance(client, SyncMPClient):
        Thread(target=last_word, args=(client.output_queue_thread, client.outputs_queue), daemon=True).start()


def _parameters(sampling: Sampling) -> Any:
    """All but the seed. They are checked as they are made, which takes 20 times as long as to copy them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # each request has a copy of its own
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Mirror the chatter of start-up, from C++ too, and print it only if start-up fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 2)
        try:
            yield
        except BaseException:
            chatter.seek(0)
            os.write(kept, chatter.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """vLLM reads `vars` of everything in loaded modules; llvmlite's lazy library answers with what is no dict."""
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


def _completion(answer: Any) -> Completion:
    output = answer.outputs[0]
    return Completion(list(output.token_ids), float(output.cumulative_logprob), str(output.finish_reason))
