"""TRL's `DPOTrainer` at its best settings on a CPU, on prepared token ids."""

import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from tests.bench.optimize.sides import Run, Setting, Watch

logging.set_verbosity_error()
logging.disable_progress_bar()
datasets.disable_progress_bars()


class PreparedDPOTrainer(DPOTrainer):
    """Trainer that takes token ids and reference log-probs as they are, and records the loss of every micro-batch."""

    def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
        self.losses: list[Any] = []
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *rest: Any) -> Any:
        return dataset

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class StepTimer(TrainerCallback):  # type: ignore[misc]
    """Callback that ends a step once its gradients are freed."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.step()


def train(setting: Setting, pairs: list[dict[str, Any]], watch: Watch, beta: float, lr: float) -> Run:
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer = _trainer(folder, setting, pairs, beta, lr)
        trainer.add_callback(StepTimer(watch))
        trainer.train()
    losses = [float(loss) for loss in trainer.losses]
    accumulated = setting.pairs // setting.size
    run = watch.run([sum(losses[n : n + accumulated]) / accumulated for n in range(0, len(losses), accumulated)])
    if setting.weights:
        trainer.model.save_pretrained(scratch := setting.weights.with_suffix(""))
        (scratch / "model.safetensors").rename(setting.weights)
    return run


def precompute(setting: Setting, pairs: list[dict[str, Any]]) -> float:
    """Return the seconds in which TRL scores the pairs of all steps but the first, which is the warm-up."""
    rows = [{name: pair[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer = _trainer(folder, setting, pairs[: setting.pairs], 0.1, 0.0)
        for part in (rows[: setting.pairs], rows[setting.pairs :]):
            dataset = datasets.Dataset.from_list(part)
            start = time.perf_counter()
            DPOTrainer._precompute_ref_logps(trainer, dataset, "train", setting.size)
        return time.perf_counter() - start


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of TRL and its libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _trainer(folder: str, setting: Setting, pairs: list[dict[str, Any]], beta: float, lr: float) -> PreparedDPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(
        setting.data.init.folder, dtype="float32", attn_implementation="sdpa", local_files_only=True
    )
    args = DPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=setting.dtype == "bfloat16",
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        max_length=None,
        beta=beta,
        per_device_train_batch_size=setting.size,
        gradient_accumulation_steps=setting.pairs // setting.size,
        num_train_epochs=1,
        learning_rate=lr,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )
    tokenizer = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    trainer = PreparedDPOTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
