"""What `Trainer` and `Seq2SeqTrainer` do, done by ours at p = 0: the same numbers, events, arrays and files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    GenerationConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_temporal import (
    TemporalSeq2SeqTrainingArguments,
    TemporalTrainingArguments,
    TemporalWeightSeq2SeqTrainer,
    TemporalWeightTrainer,
)
from tests.test_dropin import CLOCKS, arrays, data, tokenizer
from tests.tiny_models import IGNORE, SEQ2SEQ, VOCABULARY, PadCollator, causal_examples, tiny_model
from tests.tiny_training import norm

SETTINGS: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 5e-3,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 11,
}  # fmt: skip
OURS_ALONE = {"temporal_weighting.json", "loss_by_position.json"}
NOT_COMPARED = (*CLOCKS, "_memory", "_delta", "_time")


@dataclass
class Maker:
    """Makes trainers of the stock classes or of ours, which differ in nothing else, and keeps them."""

    ours: bool
    folder: Path
    made: list[Any] = field(default_factory=list)

    def __call__(self, name: str = "llama", trainer: dict[str, Any] | None = None, **arguments: Any) -> Any:
        """A trainer of the tiny model `name` and its examples; `trainer` and `arguments` override."""
        seq2seq = name in SEQ2SEQ
        kinds: tuple[Any, Any] = (
            (Seq2SeqTrainer, Seq2SeqTrainingArguments) if seq2seq else (Trainer, TrainingArguments)
        )
        zero = {}
        if self.ours:
            kinds, zero = (TemporalWeightTrainer, TemporalTrainingArguments), {"temporal_power": 0.0}
            if seq2seq:
                kinds = TemporalWeightSeq2SeqTrainer, TemporalSeq2SeqTrainingArguments
        given: dict[str, Any] = {
            "model": None if trainer and "model_init" in trainer else tiny_model(name),
            "train_dataset": data(name, 12, seed=0),
            "eval_dataset": data(name, 5, seed=1),
            **(trainer or {}),
        }
        given.setdefault("data_collator", DataCollatorForSeq2Seq(tokenizer(), model=given["model"]))
        torch.manual_seed(1)
        args = kinds[1](output_dir=str(self.folder), **{**SETTINGS, **arguments}, **zero)
        self.made.append(kinds[0](args=args, **given))
        return self.made[-1]


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


def sampling(strategy: str, **arguments: Any) -> Callable[[Maker], Any]:
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


def optimizer(name: str, **arguments: Any) -> Callable[[Maker], Any]:
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


class Nested(nn.Module):
    """No `PreTrainedModel`: takes a dictionary and a tuple, and returns what it is told to."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.returns = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY), returns

    def forward(self, tokens: dict[str, Tensor], scales: tuple[Tensor, list[Tensor]], labels: Any = None) -> Any:
        logits = self.head(self.embed(tokens["ids"]) * scales[0][:, None, None] + scales[1][0][:, None, None])
        if self.returns == "two losses":
            first = nn.functional.cross_entropy(logits.flatten(0, 1), labels["tokens"].flatten())
            loss = first + (logits.mean((1, 2)) - labels["means"]).square().mean()
        else:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return (loss, logits) if self.returns == "tuple" else {"loss": loss, "logits": logits}


def nested(returns: str) -> Callable[[Maker], Any]:
    def collate(rows: list[Any]) -> Any:
        ids = torch.stack([row["ids"] for row in rows])
        scales = torch.stack([row["scale"] for row in rows])
        labels: Any = (ids * 5 + 1) % VOCABULARY
        if returns == "two losses":
            labels = {"tokens": labels, "means": scales}
        return {"tokens": {"ids": ids}, "scales": (scales, [scales + 1]), "labels": labels}

    def behaviour(make: Maker) -> Any:
        generator = torch.Generator().manual_seed(0)
        rows = [
            {"ids": torch.randint(VOCABULARY, (6,), generator=generator), "scale": torch.rand((), generator=generator)}
            for _ in range(8)
        ]
        trainer = make(
            trainer={
                "model": Nested(returns), "train_dataset": rows, "eval_dataset": rows[:3], "data_collator": collate,
            },
            remove_unused_columns=False, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        return trainer.predict(rows[:5])

    return behaviour


BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "num_labels": 4,
}  # fmt: skip
BERT = BertConfig(**BERT_LIKE)
WAV2VEC_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (4, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0, "feat_extract_norm": "layer",
}  # fmt: skip


def rows_of(labels: Callable[[int, list[int]], dict[str, Any]]) -> list[dict[str, Any]]:
    """Eight rows of seven tokens, with labels made of the row's number and its tokens."""
    rows = [[3 + (i * 7 + j * 5) % (VOCABULARY - 3) for j in range(7)] for i in range(8)]
    return [{"input_ids": ids, **labels(i, ids)} for i, ids in enumerate(rows)]


OTHER_MODELS: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    "tagger": (
        lambda: BertForTokenClassification(BERT),
        rows_of(lambda i, ids: {"labels": [IGNORE if j == i % 4 else token % 4 for j, token in enumerate(ids)]}),
    ),
    "classifier": (lambda: BertForSequenceClassification(BERT), rows_of(lambda i, _: {"labels": i % 4})),
    "regression": (
        lambda: BertForSequenceClassification(BertConfig(**BERT_LIKE | {"num_labels": 1})),
        rows_of(lambda i, _: {"labels": i / 4}),
    ),
    "question answering": (
        lambda: BertForQuestionAnswering(BertConfig(**BERT_LIKE | {"num_labels": 2})),
        rows_of(lambda i, _: {"start_positions": i % 5, "end_positions": i % 5 + 1}),
    ),
    "two heads": (
        lambda: BertForPreTraining(BERT),
        rows_of(lambda i, ids: {"labels": [IGNORE, *ids[1:]], "next_sentence_label": i % 2}),
    ),
    "speech": (
        lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**WAV2VEC_LIKE)),
        [
            {"input_values": [((i + 2) * j % 17) / 8 - 1 for j in range(160)], "labels": [5 + i, 7, 9 + i]}
            for i in range(8)
        ],
    ),
}  # fmt: skip


def other_model(name: str, **arguments: Any) -> Callable[[Maker], Any]:
    def behaviour(make: Maker) -> Any:
        build, rows = OTHER_MODELS[name]
        torch.manual_seed(0)
        examples = Dataset.from_list(rows)
        given = {"model": build(), "train_dataset": examples, "eval_dataset": examples, "data_collator": None}
        trainer = make(trainer=given, eval_strategy="steps", eval_steps=2, **arguments)
        trainer.train()
        return trainer.predict(examples)

    return behaviour


def masked_tokens(make: Maker) -> Any:
    words = tokenizer()
    words.add_special_tokens({"mask_token": "w4"})
    torch.manual_seed(0)
    collator = DataCollatorForLanguageModeling(words, mlm_probability=0.3)
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in causal_examples(12)])
    given = {"model": BertForMaskedLM(BERT), "train_dataset": rows, "eval_dataset": rows, "data_collator": collator}
    make(trainer=given, eval_strategy="steps", eval_steps=2).train()


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


def settings(**arguments: Any) -> Callable[[Maker], Any]:
    def behaviour(make: Maker) -> Any:
        make(**arguments).train()

    return behaviour


def summaries(prediction: Any) -> dict[str, float]:
    tokens = np.clip(prediction.predictions, 0, None)
    found = {"sum": float(tokens.sum()), "width": float(tokens.shape[1]), "labels": float(prediction.label_ids.sum())}
    return found if getattr(prediction, "inputs", None) is None else {**found, "in": float(prediction.inputs.sum())}


def generation(name: str, **arguments: Any) -> Callable[[Maker], Any]:
    def behaviour(make: Maker) -> Any:
        trainer = make(
            name, trainer={"compute_metrics": summaries}, predict_with_generate=True, eval_strategy="steps",
            eval_steps=2, include_for_metrics=["inputs"], **arguments,
        )  # fmt: skip
        trainer.train()
        return (
            trainer.evaluate(max_length=5, num_beams=2),
            trainer.evaluate({"a": data(name, 3, seed=3), "b": data(name, 2, seed=4)}),
            trainer.predict(data(name, 5, seed=2), max_new_tokens=4),
        )

    return behaviour


def seq2seq_best(make: Maker) -> Any:
    trainer = make(
        "t5", trainer={"callbacks": [EarlyStoppingCallback(1)]}, optim="sgd", max_steps=8, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, label_smoothing_factor=0.1,
        learning_rate=3.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 8
    return trainer.predict(data("t5", 4, seed=2))


def seq2seq_adapters(make: Maker) -> Any:
    trainer = make("bart", trainer={"model": tiny_model("bart", "lora")}, predict_with_generate=True)
    trainer.train()
    trainer.save_model()
    return trainer.evaluate(), load_file(make.folder / "adapter_model.safetensors")


BEHAVIOURS: dict[str, Callable[[Maker], Any]] = {
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
    "nested inputs": nested("dict"),
    "nested inputs, outputs in a tuple": nested("tuple"),
    "labels in a dictionary": nested("two losses"),
    **{
        f"model: {name}": other_model(name, gradient_accumulation_steps=2)
        for name in OTHER_MODELS
        if name != "tagger"  # ignores the number of items, so that stock multiplies its loss by the steps
    },
    "model: tagger": other_model("tagger"),
    "model: smoothed classifier": other_model("classifier", label_smoothing_factor=0.1),
    "model: smoothed tagger": other_model("tagger", label_smoothing_factor=0.1, gradient_accumulation_steps=2),
    "model: masked tokens": masked_tokens,
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
    "seq2seq: generation": generation("t5", generation_max_length=6),
    "seq2seq: beams": generation("bart", generation_num_beams=2, generation_max_length=7),
    "seq2seq: generation config": generation(
        "mt5", generation_config=GenerationConfig(max_new_tokens=3, decoder_start_token_id=0, pad_token_id=0)
    ),
    "seq2seq: best model, early stopping": seq2seq_best,
    "seq2seq: adapters": seq2seq_adapters,
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
    stock, ours = Maker(False, tmp_path / "stock"), Maker(True, tmp_path / "ours")
    theirs_returned, mine_returned = BEHAVIOURS[name](stock), BEHAVIOURS[name](ours)
    assert_same(mine_returned, theirs_returned, "returned")
    for mine, theirs in zip(ours.made, stock.made, strict=True):
        assert_same(mine.state.log_history, theirs.state.log_history, "log_history")
        assert mine.state.best_global_step == theirs.state.best_global_step
        assert_same(mine.state.best_metric, theirs.state.best_metric, "best_metric")
        if theirs.model is not None:  # a search has none before it begins
            assert_same(dict(mine.model.state_dict()), dict(theirs.model.state_dict()), "parameters")
    assert files(ours.folder) - OURS_ALONE == files(stock.folder)


def files(folder: Path) -> set[str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix() for path in paths if path.name not in OURS_ALONE}


def assert_same(mine: Any, theirs: Any, where: str) -> None:
    """Equal in everything that stock has; ours may have more keys."""
    if isinstance(theirs, dict):
        for key, value in theirs.items():
            if not str(key).endswith(NOT_COMPARED):
                assert key in mine, (where, key)
                assert_same(mine[key], value, f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(mine) == len(theirs), where
        for index, (ours, stock) in enumerate(zip(mine, theirs, strict=True)):
            assert_same(ours, stock, f"{where}[{index}]")
    elif isinstance(theirs, (Tensor, np.ndarray)):
        a, b = torch.as_tensor(mine).double(), torch.as_tensor(theirs).double()
        assert a.shape == b.shape, where
        assert norm({"": a - b}) <= 2e-4 * norm({"": b}) + 1e-6, where
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6), where
    else:
        assert mine == theirs, where
