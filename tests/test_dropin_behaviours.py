"""What `Trainer` and `Seq2SeqTrainer` do, done by ours at p = 0: the same numbers, events, arrays and files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    LlamaForCausalLM,
    TrainerCallback,
)

from tests.stock_and_ours import Behaviour, Maker, assert_stock
from tests.test_dropin import arrays, data, tokenizer
from tests.tiny_models import IGNORE, PadCollator, causal_examples, tiny_model


def accuracy(prediction: Any) -> dict[str, float]:
    """Hits, and what else tells whether the arguments are the stock ones."""
    logits = next(array for array in arrays(prediction.predictions) if array.ndim == 3)
    found = {"hits": float(np.mean(logits.argmax(-1)[prediction.label_ids != IGNORE])), "cells": float(logits.size)}
    for name in ("inputs", "losses"):
        value = getattr(prediction, name, None)
        if value is not None:
            found[name] = float(np.sum(value))
    return found


def most_likely(logits: Any, labels: Tensor) -> Tensor:
    assert labels.dim() == 2
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def hits(prediction: Any) -> dict[str, float]:
    return {"hits": float(np.mean(prediction.predictions == prediction.label_ids))}


# ---- the behaviours: each is run with stock trainers and with ours, and what it returns is compared


class EveryEvent(TrainerCallback):
    """Writes down each event; asks for an evaluation, a checkpoint, a log and the end."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        for event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
            setattr(self, event, self._recorder(event))

    def _recorder(self, event: str) -> Callable[..., None]:
        def record(args: Any, state: Any, control: Any, **given: Any) -> None:
            del args
            numbers = dict.fromkeys([*(given.get("logs") or {}), *(given.get("metrics") or {})])
            self.events.append({event: state.global_step, "given": sorted(given), "numbers": numbers})
            if event == "on_step_end":
                control.should_evaluate = state.global_step == 1
                control.should_save = state.global_step == 2
                control.should_log = state.global_step == 3
                control.should_training_stop = state.global_step == 5

        return record


def callbacks(make: Maker) -> Any:
    callback = EveryEvent()
    trainer = make(
        trainer={"callbacks": [callback]}, max_steps=9, logging_strategy="no", gradient_accumulation_steps=2
    )
    trainer.train()
    trainer.remove_callback(EveryEvent)
    trainer.evaluate()
    return callback.events


def label_names(make: Maker) -> Any:
    trainer = make(label_names=["labels", "attention_mask"], eval_strategy="steps", eval_steps=2)
    trainer.train()
    return [arrays(trainer.predict(data("llama", 5, seed=2)).label_ids)]


def several_evaluation_sets(make: Maker) -> Any:
    sets = {"first": data("llama", 5, seed=1), "second": data("llama", 3, seed=2)}
    trainer = make(
        trainer={"eval_dataset": sets, "compute_metrics": accuracy}, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="second_hits",
        greater_is_better=True, save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    return trainer.evaluate(), trainer.evaluate(sets["first"], metric_key_prefix="last")


def best_model_and_early_stopping(make: Maker) -> Any:
    trainer = make(
        trainer={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]}, learning_rate=0.5, max_steps=12,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        save_only_model=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 12
    return trainer.evaluate()


def metrics_batch_by_batch(make: Maker) -> Any:
    seen: list[float] = []

    def compute(prediction: Any, compute_result: bool) -> dict[str, float]:
        seen.append(float(prediction.predictions.argmax(-1).eq(prediction.label_ids).sum()))
        return {"hits": sum(seen), "batches": len(seen)} if compute_result else {}

    trainer = make(trainer={"compute_metrics": compute}, batch_eval_metrics=True, include_for_metrics=["loss"])
    trainer.train()
    return trainer.evaluate(), seen


def logits_preprocessed(make: Maker) -> Any:
    trainer = make(
        trainer={"compute_metrics": hits, "preprocess_logits_for_metrics": most_likely},
        eval_strategy="steps", eval_steps=2, eval_accumulation_steps=1,
    )  # fmt: skip
    trainer.train()
    return trainer.predict(data("llama", 5, seed=2))


def metrics_of_inputs_and_losses(make: Maker) -> Any:
    trainer = make(trainer={"compute_metrics": accuracy}, include_for_metrics=["inputs", "loss"])
    trainer.train()
    return trainer.evaluate()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(causal_examples(9, seed=3))


def torch_streams(make: Maker) -> Any:
    trainer = make(
        trainer={"train_dataset": Stream(), "eval_dataset": Stream()}, max_steps=6, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    trainer.train()
    return trainer.predict(Stream())


def data_sets_streamed(make: Maker) -> Any:
    stream = data("llama", 12, seed=0).to_iterable_dataset().shuffle(seed=3, buffer_size=4)
    make(trainer={"train_dataset": stream}, eval_strategy="steps", eval_steps=2).train()


def sampling(strategy: str, **arguments: Any) -> Behaviour:
    def behaviour(make: Maker) -> Any:
        rows = data("llama", 12, seed=0)
        rows = rows.add_column("size", [len(row) for row in rows["labels"]])
        make(trainer={"train_dataset": rows}, train_sampling_strategy=strategy, num_train_epochs=2, max_steps=-1,
             **arguments).train()  # fmt: skip

    return behaviour


def noise_on_embeddings(make: Maker) -> Any:
    trainer = make(neftune_noise_alpha=5.0, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    return trainer.evaluate()


def optimizer(name: str, **arguments: Any) -> Behaviour:
    def behaviour(make: Maker) -> Any:
        make(optim=name, eval_strategy="steps", eval_steps=2, **arguments).train()

    return behaviour


def optimizer_of_ones_own(make: Maker) -> Any:
    model = tiny_model("llama")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=2)
    make(trainer={"model": model, "optimizers": (sgd, schedule)}, max_grad_norm=0.0).train()
    make(trainer={"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 1e-3})}).train()


def search(make: Maker) -> Any:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = []

    def objective(metrics: dict[str, float]) -> float:
        found.append(metrics["eval_loss"])
        return metrics["eval_loss"]

    trainer = make(
        trainer={"model_init": lambda: tiny_model("llama")}, max_steps=2, eval_strategy="steps", eval_steps=2
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
        compute_objective=objective, n_trials=3, direction="minimize", backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )  # fmt: skip
    assert len(found) == 3
    return found, best.objective, best.hyperparameters


def saved_and_loaded(make: Maker) -> Any:
    trainer = make(trainer={"processing_class": tokenizer()})
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())
    again = make(trainer={"model": LlamaForCausalLM.from_pretrained(make.folder)})
    return load_file(make.folder / "model.safetensors"), again.evaluate(), again.predict(data("llama", 5, seed=2))


def resumed(make: Maker) -> Any:
    how: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2,
        "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip
    make(**how).train()
    make(**how).train(resume_from_checkpoint=str(make.folder / "checkpoint-2"))


def adapters(make: Maker) -> Any:
    trainer = make(
        trainer={"model": tiny_model("llama", "lora")}, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(make.folder))
    resumed_model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    make(trainer={"model": resumed_model}, max_steps=6).train(resume_from_checkpoint=str(make.folder / "checkpoint-4"))
    return load_file(make.folder / "adapter_model.safetensors"), make(trainer={"model": loaded}).evaluate()


def all_columns(make: Maker) -> Any:
    seen: list[Any] = []
    pad = PadCollator()

    def collate(rows: list[Any]) -> Any:
        seen.append([sorted(row) for row in rows])
        return pad(rows)

    trainer = make(trainer={"data_collator": collate}, remove_unused_columns=False)
    trainer.train()
    trainer.evaluate()
    return seen


def without_labels(make: Maker) -> Any:
    rows = data("llama", 5, seed=2).remove_columns("labels")
    trainer = make()
    trainer.train()
    return trainer.evaluate(rows), trainer.predict(rows)


def ignored_keys(make: Maker) -> Any:
    model = tiny_model("llama", output_hidden_states=True)
    trainer = make(trainer={"model": model}, eval_strategy="steps", eval_steps=2, eval_do_concat_batches=False)
    trainer.train(ignore_keys_for_eval=["past_key_values", "hidden_states"])
    kept = trainer.predict(data("llama", 5, seed=2))
    return kept, trainer.predict(data("llama", 5, seed=2), ignore_keys=["past_key_values", "hidden_states"])


def settings(**arguments: Any) -> Behaviour:
    def behaviour(make: Maker) -> Any:
        make(**arguments).train()

    return behaviour


BEHAVIOURS: dict[str, Behaviour] = {
    "callbacks": callbacks,
    "label names": label_names,
    "several evaluation sets": several_evaluation_sets,
    "best model, early stopping": best_model_and_early_stopping,
    "batch_eval_metrics": metrics_batch_by_batch,
    "preprocess_logits_for_metrics": logits_preprocessed,
    "include_for_metrics": metrics_of_inputs_and_losses,
    "iterable data set of torch": torch_streams,
    "iterable data set of datasets": data_sets_streamed,
    "sampling: random": sampling("random", data_seed=5),
    "sampling: sequential": sampling("sequential", dataloader_drop_last=True, per_device_train_batch_size=5),
    "sampling: group_by_length": sampling("group_by_length"),
    "sampling: by a column": sampling("group_by_length", length_column_name="size"),
    "NEFTune": noise_on_embeddings,
    "optimizer: adafactor": optimizer("adafactor"),
    "optimizer: fused": optimizer("adamw_torch_fused", lr_scheduler_type="cosine", warmup_steps=1),
    "optimizer: schedule-free": optimizer("schedule_free_adamw", lr_scheduler_type="constant"),
    "optimizer: 8 bits of bitsandbytes": optimizer("adamw_bnb_8bit"),
    "optimizer: 8 bits of torchao": optimizer("adamw_torch_8bit"),
    "optimizer of one's own": optimizer_of_ones_own,
    "hyperparameter_search": search,
    "safetensors": saved_and_loaded,
    "resumed": resumed,
    "adapters": adapters,
    "remove_unused_columns=False": all_columns,
    "data without labels": without_labels,
    "ignored keys": ignored_keys,
    "logged by epoch": settings(
        num_train_epochs=2, max_steps=-1, logging_strategy="epoch", eval_strategy="epoch", eval_delay=1
    ),
    "first step logged": settings(logging_first_step=True, logging_steps=3, gradient_accumulation_steps=3),
    "workers": settings(
        dataloader_num_workers=1, dataloader_persistent_workers=True, eval_strategy="steps", eval_steps=2
    ),
    "auto_find_batch_size": settings(auto_find_batch_size=True),
    "tokens seen": settings(include_num_input_tokens_seen="all", average_tokens_across_devices=False),
    "accelerator": settings(accelerator_config={"split_batches": True, "dispatch_batches": True}),
    "bf16 in evaluation": settings(bf16_full_eval=True, eval_on_start=True),
}  # fmt: skip
NEEDS = {
    "optimizer: schedule-free": "schedulefree",
    "optimizer: 8 bits of bitsandbytes": "bitsandbytes",
    "optimizer: 8 bits of torchao": "torchao",
}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_behaviour_is_the_stock_one(name: str, tmp_path: Path) -> None:
    package = NEEDS.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, which is not installed")
    assert_stock(BEHAVIOURS[name], tmp_path)
