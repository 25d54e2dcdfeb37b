"""Engine on vLLM."""

import gc
import inspect
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, get_args

from pydantic import ValidationError

from pipeline.processes import end_orphans, end_with
from pipeline.resources import current_resources
from pipeline.store.fingerprints import ADAPTER
from schemas import MachineError, WinnowError
from stages.limits import context_length
from stages.model_config import FROM_FOLDER
from stages.network.device import gpu_holders, nvidia_smi
from stages.sampling.engines import Completion, DeadEngineError, Request, Sampling
from stages.sampling.engines.options import CPU_CACHE, CPU_CACHE_GIB, CPU_STEP_TOKENS, MAX_SEQUENCES
from stages.sampling.engines.request_queue import QueuedEngine
from stages.sampling.memory import GPU_SHARE

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # which is held back while an engine starts; stdout has our results
    # A fork of a process that has asked torch for GPUs has none: on an H200 no engine started. vLLM itself spawns only
    # where it sees that CUDA is in use, and `torch.cuda.is_available()` alone does not show.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it has no seed per request, so it would be imported and never used
    CPU_CACHE: CPU_CACHE_GIB,
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the process trains afterwards, on all of its threads
}
ERROR_LINE = re.compile(
    r"((?:[A-Z]\w*Error|[A-Z]\w*Exception): .+)"
)  # last of a traceback, perhaps in a line of the log
CURE = "set `engine: transformers` (of a judge: in its `by`)"
CONTEXT = 1 << 10  # MiB of a GPU that an engine's process takes before vLLM counts what is free
LLVMLITE = "llvmlite.binding.ffi"
# Tokens in a block of the KV cache on a CPU, where vLLM has 128: the draws of a prompt share its whole blocks alone. A
# random Llama of 135M parameters, fp32, one core that others used too, 8 draws of 40 tokens from each of 6 prompts, two
# runs each: prompts of 100 tokens 51 and 43 tokens/s with 128, 122 and 99 with 32; of 300, 37 and 61, then 53 and 101;
# of 30, which share no block, 90 and 122, then 88 and 97. The draws were the same.
CPU_BLOCK_TOKENS = 32


class VllmEngine(QueuedEngine):
    """Engine that makes one vLLM request per draw, each with its own seed: more draws later are a pure extension.

    `add`, `step` and `abort` are the parts of the loop of `LLM.generate`.
    """

    def __init__(
        self, folder: Path, dtype: str, tensor_parallel: int = 1, options: dict[str, Any] | None = None
    ) -> None:
        import torch

        from stages.network.device import THREADS

        options = options or {}
        super().__init__(window=2 * options.get("max_num_seqs", MAX_SEQUENCES))
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            # In this process the engine starts in seconds. On a GPU it is a subprocess, whose end frees the memory.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        else:
            _check_gpus(tensor_parallel, options)
        torch.set_num_threads(THREADS)
        end_orphans()  # an engine that a killed run left has a GPU's memory
        with tempfile.TemporaryFile() as file:
            self.log = os.dup(file.fileno())  # stderr of the engine's process for as long as it lives
        with _quiet_start(self.log), _unchanged_class(folder) if on_cpu else nullcontext():
            from vllm import LLM

            _let_processes_end_with_this_one()
            if on_cpu:
                _count_without_compiler()
                _freeze_libraries()
            devices = tensor_parallel * options.get("pipeline_parallel_size", 1)
            arguments: dict[str, Any] = dict(
                model=str(folder),
                dtype=dtype,
                seed=0,
                tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="uni" if devices == 1 else "mp",
                enforce_eager=on_cpu,
                logprobs_mode="raw_logprobs",
                max_num_seqs=MAX_SEQUENCES,
                max_num_batched_tokens=max(CPU_STEP_TOKENS, context_length(folder)) if on_cpu else None,
                disable_log_stats=True,
                trust_remote_code=False,
                generation_config="vllm",  # the folder's own sampling defaults would change draws
                **_lora_options(folder),
            )
            if on_cpu:
                arguments["block_size"] = CPU_BLOCK_TOKENS
                arguments["enable_chunked_prefill"] = False  # a split prompt rewinds a seed; CPU seeds cannot
                if options.get("enable_chunked_prefill"):
                    raise WinnowError("engine_options: enable_chunked_prefill: on a CPU, draws would lose their seeds")
            try:
                with _frozen_libraries() if on_cpu else nullcontext():
                    self.llm: Any = LLM(**arguments | options)
            except (OSError, MemoryError, torch.OutOfMemoryError):  # of this machine: not what vLLM says of the model
                raise
            except NotImplementedError as error:  # a RuntimeError
                raise WinnowError(_refusal(folder, options, error)) from error
            except RuntimeError as error:
                # On a GPU the engine is a process: what ended it is only in its log. Another worker may do better.
                causes = [*ERROR_LINE.findall(_cause(error)), *_errors(self.log), _cause(error)]
                raise ChildProcessError(
                    f"vLLM's engine did not start: {causes[0]}; VLLM_LOGGING_LEVEL=INFO in the "
                    f"environment shows more; if it is not of this machine, {CURE}"
                ) from error
            except Exception as error:  # a model that it does not know can end in any error, of pydantic as of Python
                raise WinnowError(_refusal(folder, options, error)) from error
            self.adapter: Any = None  # vLLM's name for the policy's adapter, which each request has
            if (folder / ADAPTER).exists():
                from vllm.lora.request import LoRARequest

                self.adapter = LoRARequest("policy", 1, str(folder))
        _wake_when_engine_dies(self.llm.llm_engine.engine_core)
        self.on_cpu, self.has_answered = on_cpu, False
        self.params: dict[Sampling, Any] = {}  # per engine: vLLM adds its folder's stop ids to a set that copies share

    def add(self, request_id: str, request: Request, sampling: Sampling) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        if sampling not in self.params:
            self.params[sampling] = SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                logit_bias=dict(sampling.logit_bias) or None,
                bad_words=list(sampling.bad_words),
                min_tokens=sampling.min_tokens,
                max_tokens=sampling.max_tokens,
                stop=list(sampling.stop),
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=sampling.ignore_eos,
                logprobs=0,
                flat_logprobs=True,
                detokenize=bool(sampling.stop),
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,  # each request has a copy of its own
            )
        params = copy(self.params[sampling])  # a validation of new ones takes 20 times as long
        params.seed = request.seed
        with self._named_death():
            self.llm.llm_engine.add_request(
                request_id, tokens_input(list(request.prompt_ids)), params, lora_request=self.adapter
            )

    def step(self) -> dict[str, Completion]:
        import torch

        try:
            with self._named_death():
                answers = self.llm.llm_engine.step()
        except (torch.OutOfMemoryError, DeadEngineError):
            raise
        except RuntimeError as error:
            # On a CPU, kernels that lack the model's shape are only called by the first step. Later the cause may be a
            # prompt, which is looked for (pipeline/execution/retries.py); on a GPU the engine is a process, and dies.
            if self.on_cpu and not self.has_answered:
                raise WinnowError(f"vLLM's engine ended in its first step: {_cause(error)}; {CURE}") from error
            raise
        completions = {}
        self.has_answered = True
        for answer in answers:
            if answer.finished:
                output = answer.outputs[0]
                ids, reason = list(output.token_ids), str(output.finish_reason)
                if isinstance(output.stop_reason, str):
                    reason = "stop_string"
                completions[answer.request_id] = Completion(ids, float(output.cumulative_logprob), reason)
        return completions

    def abort(self, request_ids: list[str]) -> None:
        self.llm.llm_engine.abort_request(request_ids)

    def close(self) -> None:
        """Free the weights and the KV cache; vLLM keeps both until its engine core is shut down."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        with _frozen_libraries() if self.on_cpu else nullcontext():
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
            cleanup_dist_env_and_memory()
        os.close(self.log)
        gc.collect()

    @contextmanager
    def _named_death(self) -> Iterator[None]:
        """Raise DeadEngineError where vLLM says that the process of its engine has ended, with the last error there."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            causes = _errors(self.log)
            why = causes[-1] if causes else "something may have killed it, as the kernel does where memory runs out"
            raise DeadEngineError(
                f"the process of vLLM's engine has ended: {why} (VLLM_LOGGING_LEVEL=INFO in the environment logs more)"
            ) from error


# vLLM's own main functions of its processes, where ours have taken their place: of the engine core, of its workers.
_mains: list[Callable[..., None]] = []


def _let_processes_end_with_this_one() -> None:
    """Let vLLM's processes end when this one has ended, however: a killed one would leave them (vllm#55510)."""
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.executor.multiproc_executor import WorkerProc

    if not _mains:
        _mains.extend([EngineCoreProc.run_engine_core, WorkerProc.worker_main])
        EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
        WorkerProc.worker_main = staticmethod(run_worker)


def run_engine_core(*arguments: Any, **options: Any) -> None:
    """Run vLLM's engine core: the main function of its process."""
    _let_processes_end_with_this_one()
    _run_in_child(_mains[0], arguments, options)


def run_worker(*arguments: Any, **options: Any) -> None:
    """Run a worker of vLLM's engine core: the main function of its process."""
    _let_processes_end_with_this_one()
    _run_in_child(_mains[1], arguments, options)


def _run_in_child(main: Callable[..., None], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with(parent.pid)
    main(*arguments, **options)


def _check_gpus(tensor_parallel: int, options: dict[str, Any]) -> None:
    """Raise WinnowError before an engine starts on GPUs that it may not have, would not use, or that are not free.

    Asked is nvidia-smi: torch would take memory of the GPUs for its answer, and vLLM's engine is another process.
    """
    count, reserved = tensor_parallel * int(options.get("pipeline_parallel_size") or 1), current_resources().gpus
    if reserved == 0:
        raise WinnowError(
            "the profile gives this step `gpus: 0`, and this vLLM is the one for GPUs, which computes on no CPU: "
            f"set `gpus: {count}` in the profile, or `engine: transformers`"
        )
    if reserved and reserved > count:
        raise WinnowError(
            f"the profile gives each worker of this step gpus: {reserved:g}, and its engine runs on {count}: set "
            f"`tensor_parallel: {reserved:g}` in the profile, or `gpus: {count}` and more `max_workers`"
        )
    # In the order in which this process sees them: the engine takes the first ones of `CUDA_VISIBLE_DEVICES`.
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    rows = nvidia_smi("--query-gpu=memory.free,memory.total,index")
    rows = sorted(rows, key=lambda row: visible.index(row[-1]) if row[-1] in visible else 0)[:count]
    if any(not cell.isdecimal() for row in rows for cell in row) or len({row[1] for row in rows}) > 1:
        return  # cards of several kinds, in whose order CUDA and nvidia-smi differ; vLLM looks for itself
    share = float(options.get("gpu_memory_utilization") or GPU_SHARE)
    for free, total, index in (map(int, row) for row in rows):
        if free < share * total + CONTEXT:
            room = int(100 * (free - CONTEXT) / total) / 100
            raise MachineError(
                f"GPU {index} has {free / 1024:.1f} of its {total / 1024:.1f} GiB free, and vLLM takes "
                f"{share * total / 1024:.1f} GiB of it (gpu_memory_utilization: {share:g}); it is held by "
                f"{gpu_holders() or 'a process that nvidia-smi does not name'}; end what holds it, or set "
                f"`engine_options: {{gpu_memory_utilization: {room:g}}}` (of a judge: in its `by`)"
            )


def _lora_options(folder: Path) -> dict[str, Any]:
    """Return vLLM's options for the adapter in a policy's folder, beside its base's weights; none without one.

    Raises WinnowError for an adapter that vLLM does not take.
    """
    if not (folder / ADAPTER).exists():
        return {}
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    ranks = get_args(MaxLoRARanks)
    try:
        adapter = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
        rank = max([adapter.r, *adapter.rank_pattern.values()])
        size = min((size for size in ranks if size >= rank), default=max(ranks))
        adapter.validate_legal(LoRAConfig(max_lora_rank=size))
    except ValueError as error:
        raise WinnowError(
            f"engine: vllm cannot sample the policy's adapter ({error}); set `engine: transformers`, or "
            "`merge_lora: true` in the step that trained it"
        ) from None
    return {"enable_lora": True, "max_lora_rank": size}


def _refusal(folder: Path, options: dict[str, Any], error: Exception) -> str:
    """Return in one line why vLLM takes no such options, or no such model, and what to do."""
    refused = f"engine_options: vLLM refuses {options}" if options else f"vLLM refuses {folder}"
    return f"{refused}: {_cause(error)}; {'change them' if options else CURE}"


def _cause(error: Exception) -> str:
    """Return the message of an exception in one line, of pydantic's the messages of its errors."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors())
    message = " ".join(str(error).split())
    if not message or isinstance(error, LookupError | AttributeError | AssertionError):  # which say little alone
        message = f"{type(error).__name__} {message}".strip()
    return message


def _wake_when_engine_dies(client: Any) -> None:
    """Put an error in the answer queue when a subprocess engine ends: vLLM 0.32 would wait indefinitely."""
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    def report_death(reader: Thread, answers: Any) -> None:
        reader.join()
        answers.put(EngineDeadError())

    if isinstance(client, SyncMPClient):
        Thread(target=report_death, args=(client.output_queue_thread, client.outputs_queue), daemon=True).start()


@contextmanager
def _unchanged_class(folder: Path) -> Iterator[None]:
    """Take back what vLLM does to a class of transformers, by which other steps of this process load their networks.

    A family that vLLM has no code of its own for runs as transformers' network, whose class vLLM decorates in place
    (vllm/compilation/decorators.py): outside of an engine, no network could be made of it again. In an engine without
    compilation the decoration does nothing.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        with torch.device("meta"):
            network = AutoModel.from_config(AutoConfig.from_pretrained(folder, **FROM_FOLDER), trust_remote_code=False)
        decoder = type(network.get_decoder())
    except (ValueError, AttributeError):  # not a network of transformers, or one without a decoder
        yield
        return
    bases, before = decoder.__bases__, dict(vars(decoder))
    try:
        yield
    finally:
        decoder.__bases__ = bases
        for name in ("__init__", "__call__"):
            if name in before:
                setattr(decoder, name, before[name])
            elif name in vars(decoder):
                delattr(decoder, name)


def _count_without_compiler() -> None:
    """Replace vLLM's count of likelier ids, which is in no table of ours, by the same function without inductor.

    It is one comparison. The first draw of each process waited for it 4 s, 15 s without a cache of compiled code, and
    failed on a machine without a C++ compiler.
    """
    from vllm.v1.sample import sampler

    sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)


@cache
def _freeze_libraries() -> None:
    """Let the garbage collector pass over what is there when vLLM has been imported, once per process."""
    gc.collect()
    gc.freeze()


@contextmanager
def _frozen_libraries() -> Iterator[None]:
    """Keep vLLM from freezing the engine, and from unfreezing the libraries.

    An engine in this process collects all garbage four times as it starts and as many times as it ends. Over the
    millions of objects of the libraries that took 3.7 of the 6.1 s of the start and end of a tiny model.
    """
    functions = gc.freeze, gc.unfreeze
    gc.freeze = gc.unfreeze = lambda: None
    try:
        yield
    finally:
        gc.freeze, gc.unfreeze = functions


@contextmanager
def _quiet_start(log: int) -> Iterator[None]:
    """Hold back in `log` what start-up prints, from C++ too, and all that processes print which start here.

    It is printed if start-up fails and no line says why; the descriptor is closed where start-up fails.

    Hide llvmlite's lazy library too: vLLM calls `vars` on everything in every loaded module, and it has no dict.
    """
    llvmlite = sys.modules.pop(LLVMLITE, None)
    sys.stderr.flush()
    stderr = os.dup(2)
    os.dup2(log, 2)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, WinnowError | ChildProcessError):
            os.write(stderr, _text(log).encode())
        os.close(log)
        raise
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        if llvmlite is not None:
            sys.modules[LLVMLITE] = llvmlite


def _errors(log: int) -> list[str]:
    """Return the errors in a log, each the last line of a traceback."""
    return [str(error) for line in _text(log).splitlines() for error in ERROR_LINE.findall(line)]


def _text(log: int) -> str:
    sys.stderr.flush()
    return os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")
