"""What is trained and evaluated on several processes, each case against one process or the stock trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, ParallelismConfig
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorWithFlattening,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Trainer,
    default_data_collator,
)
from transformers.distributed import DistributedConfig

from hf_temporal import (
    TemporalSeq2SeqTrainingArguments,
    TemporalTrainingArguments,
    TemporalWeightSeq2SeqTrainer,
    TemporalWeightTrainer,
)
from hf_temporal.evaluation import load_profiles
from hf_temporal.padding_free import use_padding_free
from tests.test_trainer_models import Regressor, series
from tests.tiny_models import IGNORE, Example, PackCollator, PadCollator, examples, tiny_model
from tests.tiny_training import Steps, train

STEPS = 5
GLOBAL_BATCH = 8
HEADS = ("num_attention_heads", "num_key_value_heads")
WEIGHTINGS = [
    (power, normalization)
    for power in (0.0, 2.0, math.inf)
    for normalization in ("sequence", "batch", "tokens")
    if (power, normalization) != (math.inf, "tokens")
]


class WideCollator(PadCollator):
    """Pads to 20 columns: where one process puts the batches of all together, they have to be of one width."""

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (20 - len(row)) for row in rows])


class Stream(IterableDataset[Example]):
    """Rows without a length."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)


def rows_of(model: str, count: int) -> list[Any]:
    """Uneven examples of a model, with float labels where it is no language model."""
    return series(count) if model == "regressor" else list(examples(model, count))


class OnAccelerators(TemporalTrainingArguments):
    """accelerate shards on accelerators only; told that the CPU is one, it runs all of its FSDP2 with gloo."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class ZeroOnCPU(TemporalTrainingArguments):
    """DeepSpeed over gloo, without collectives of its own, which it would compile first."""

    def __post_init__(self) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super().__post_init__()


@dataclass(frozen=True)
class TrainingCase:
    """Five optimizer steps of eight uneven rows each, the last step of fewer; then an evaluation.

    Args:
        rows: how many there are. Where they are no multiple of eight, the data loader of several processes fills up
            the last batches from the first rows on; on one process the same rows are added by hand.
        filled_to: the multiple that it fills up to, 1 where it does not; None: the number of processes.
        evaluated: how many rows are evaluated.
        accumulation: micro-batches of a step.
        cut: one batch is made for all processes and cut up.
        stream: the rows come without a length.
        own_weights: the rows bring `loss_weights`.
        stock: compared with the stock trainer on the same processes, not with one process.
        options: of the arguments, on one process, too.
        config: of the model.
        ranks_per_row: between how many processes each row is split (context parallelism).
        ranks_per_layer: between how many processes each layer is split (tensor parallelism); the model is a Llama
            whose heads can be divided.
        engine: of the arguments, on several processes alone.
    """

    model: str
    power: float = 2.0
    normalization: str = "sequence"
    adapter: str = "plain"
    rows: int = 37
    filled_to: int | None = GLOBAL_BATCH
    evaluated: int = 15
    accumulation: int = 1
    cut: bool = False
    stream: bool = False
    own_weights: bool = False
    stock: bool = False
    collator: Any = field(default_factory=PadCollator)
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ranks_per_row: int = 1
    ranks_per_layer: int = 1
    engine: dict[str, Any] = field(default_factory=dict)

    def run(
        self, processes: int, folder: Path, *, like: int | None = None, trainer: type[Trainer] = TemporalWeightTrainer
    ) -> Steps:
        """Train on this process, one of `processes`; a process alone takes the rows that `like` processes take."""
        rows = self._rows()
        if processes == 1:
            rows += rows[: -len(rows) % (self.filled_to or like or 1)]
        loaders = max(processes // (self.ranks_per_row * self.ranks_per_layer), 1)
        engine = {**self.engine} if processes > 1 else {}
        if self.ranks_per_row > 1 and processes > 1:
            engine["parallelism_config"] = ParallelismConfig(cp_size=self.ranks_per_row, dp_shard_size=loaders)
        arguments = {
            "batch_size": GLOBAL_BATCH // self.accumulation // (1 if self.cut else loaders),
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": STEPS,
            "max_grad_norm": 1.0,
            "eval_strategy": "steps",
            "eval_steps": STEPS,
            "per_device_eval_batch_size": 4,
            "trainer_arguments": {"eval_dataset": rows_of(self.model, self.evaluated)},
            "temporal_power": self.power,
            "temporal_normalization": self.normalization,
            "temporal_fused_head": "on" if trainer is TemporalWeightTrainer else "auto",
            "dataset": Stream(rows) if self.stream else rows,
            **self.options,
            **engine,
        }
        classes = {"fsdp": OnAccelerators, "deepspeed": ZeroOnCPU}
        if self.ranks_per_layer > 1 and processes > 1:
            arguments_class: type[TemporalTrainingArguments] = OnAccelerators
        else:
            arguments_class = next((classes[key] for key in classes if key in arguments), TemporalTrainingArguments)
        model = self._model() if self.ranks_per_layer == 1 else self._divided_model(loaders, processes, folder)
        return train(trainer, arguments_class, model, rows, folder, collator=self.collator, **arguments)

    def _model(self) -> Any:
        model = Regressor() if self.model == "regressor" else tiny_model(self.model, self.adapter, **self.config)
        assert not isinstance(self.collator, DataCollatorWithFlattening) or use_padding_free(model)
        return model

    def _divided_model(self, loaders: int, processes: int, folder: Path) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(**{**tiny_model("llama").config.to_dict(), **dict.fromkeys(HEADS, 4), **self.config})
        model = LlamaForCausalLM(config)
        if processes == 1:
            return model
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                model.save_pretrained(folder / "whole")
        split = DistributedConfig(tp_size=self.ranks_per_layer, fsdp_size=loaders)
        return LlamaForCausalLM.from_pretrained(folder / "whole", distributed_config=split)

    def _rows(self) -> list[Any]:
        """Four in a row have no target: on two processes and on four, some have none of a step's."""
        rows = rows_of(self.model, self.rows)
        if isinstance(self.collator, DataCollatorWithFlattening):  # rows of one task begin alike
            for row in rows:
                row["input_ids"] = [*range(5, 15), *row["input_ids"]]
                row["labels"] = [IGNORE] * 10 + row["labels"]
        for i, row in enumerate(rows):
            if 12 <= i < 16:
                labels = row["labels"]
                row["labels"] = labels * math.nan if self.model == "regressor" else [IGNORE] * len(labels)
            if self.own_weights:
                row["loss_weights"] = [(i + j) % 3 / 2 for j, _ in enumerate(row["labels"])]
        return rows


@dataclass(frozen=True)
class EvaluationCase:
    """Eleven examples, `batch_size` a batch: on several processes the last batches hold some that came before.

    With `generates`, the model generates, too, and what it generates is counted.
    """

    model: str
    power: float
    normalization: str
    collator: Any = field(default_factory=PadCollator)
    engine: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 2
    generates: bool = False

    def run(self, processes: int, folder: Path, *, stock: bool = False) -> dict[str, float]:
        """The metrics; the profile is left in `folder`."""
        arguments: Any = TemporalTrainingArguments
        trainer: Any = Trainer if stock else TemporalWeightTrainer
        generation: dict[str, Any] = {}
        if self.generates:
            arguments = TemporalSeq2SeqTrainingArguments
            trainer = Seq2SeqTrainer if stock else TemporalWeightSeq2SeqTrainer
            generation = {"predict_with_generate": True, "generation_max_length": 7}
        args = arguments(
            str(folder),
            per_device_eval_batch_size=self.batch_size,
            temporal_power=self.power,
            temporal_normalization=self.normalization,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **generation,
            **(self.engine if processes > 1 else {}),
        )
        assert args.world_size == processes
        rows = examples(self.model, 11)
        return trainer(
            tiny_model(self.model), args, eval_dataset=rows, data_collator=self.collator,
            compute_metrics=tokens_generated if self.generates else None,
        ).evaluate()  # fmt: skip


def tokens_generated(prediction: EvalPrediction) -> dict[str, float]:
    """How many, and the sum of their squares."""
    tokens = torch.as_tensor(prediction.predictions).double()
    return {"tokens": float((tokens > 0).sum()), "squares": float(tokens.clamp(min=0).square().sum())}


def dispatch(**options: bool) -> dict[str, Any]:
    """How accelerate's data loaders hand out batches."""
    return {"accelerator_config": options}


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed, with what the arguments say of batches, accumulation and clipping."""
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    settings = dict.fromkeys((*batch, "gradient_clipping"), "auto")
    return {"deepspeed": {**settings, "zero_optimization": {"stage": stage}}}


FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
FROM_FIRST_RANK = {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}}
SPLIT, DISPATCH = dispatch(split_batches=True), dispatch(dispatch_batches=True)
OFF = {"average_tokens_across_devices": False}
FULL_LOGITS, AUTO = {"temporal_fused_head": "off"}, {"temporal_fused_head": "auto"}

QUICK = {
    "padded": TrainingCase("llama"),
    "accumulated, weighted over the batch": TrainingCase("gpt2", 2.0, "batch", accumulation=2),
    "encoder-decoder at p = 0": TrainingCase("t5", 0.0),
    "padding-free": TrainingCase("llama", collator=DataCollatorWithFlattening()),
    "LoRA on the head, last token": TrainingCase("llama", math.inf, "batch", adapter="lora_head"),
    "as stock at p = 0": TrainingCase("llama", 0.0, stock=True, options=OFF),
    "FSDP2, tied head": TrainingCase("qwen3", engine=FSDP2),
    "FSDP2, LoRA on the head": TrainingCase("llama", adapter="lora_head", options=FULL_LOGITS, engine=FSDP2),
}
TRAINING = {
    **{
        f"{model} at p = {power}, {normalization}": TrainingCase(
            model, power, normalization, accumulation=accumulation
        )
        for model, accumulation in [("llama", 2), ("qwen3", 1), ("t5", 1), ("bart", 2)]
        for power, normalization in WEIGHTINGS
    },
    **{f"{model}, full logits": TrainingCase(model, options=FULL_LOGITS) for model in ("llama", "qwen3", "bart")},
    **{
        f"{model} with {adapter}": TrainingCase(model, adapter=adapter)
        for model in ("llama", "t5")
        for adapter in ("lora", "lora_head", "saved_head")
    },
    "last batches not filled up": TrainingCase("llama", rows=39, filled_to=1, engine=dispatch(even_batches=False)),
    "own weights": TrainingCase("llama", normalization="batch", own_weights=True),
    "label smoothing": TrainingCase("llama", options={"label_smoothing_factor": 0.1}),
    "power that grows": TrainingCase("llama", options={"temporal_power_schedule": "linear"}),
    "weights of the whole sequence": TrainingCase("gpt2", options={"temporal_origin": "sequence"}),
    "left-padded": TrainingCase("llama", collator=PadCollator("left")),
    "packed": TrainingCase("llama", collator=PackCollator()),
    "split": TrainingCase("llama", cut=True, engine=SPLIT),
    "split and accumulated": TrainingCase("t5", accumulation=2, cut=True, engine=SPLIT, normalization="batch"),
    "dispatched": TrainingCase("llama", filled_to=None, collator=WideCollator(), engine=DISPATCH),
    "dispatched with own weights": TrainingCase(
        "t5", normalization="batch", filled_to=None, own_weights=True, collator=WideCollator(), engine=DISPATCH
    ),
    "dispatched and split": TrainingCase(
        "gpt2", rows=40, evaluated=16, cut=True, engine=dispatch(dispatch_batches=True, split_batches=True)
    ),
    "stream, dispatched": TrainingCase("llama", filled_to=None, stream=True, collator=WideCollator()),
    "stream, split": TrainingCase("llama", rows=40, cut=True, stream=True, engine=SPLIT),
    "as stock, accumulated": TrainingCase("llama", 0.0, accumulation=2, stock=True),
    "as stock, accumulated, averaged by rank": TrainingCase("llama", 0.0, accumulation=2, stock=True, options=OFF),
    "as stock, encoder-decoder averaged by rank": TrainingCase("t5", 0.0, stock=True, options=OFF),
    "as stock, mixture of experts averaged by rank": TrainingCase("mixtral", 0.0, rows=12, stock=True, options=OFF),
    "float labels": TrainingCase("regressor", options=AUTO, collator=default_data_collator),
    "float labels, accumulated, weighted over the batch": TrainingCase(
        "regressor", 2.0, "batch", accumulation=2, options=AUTO, collator=default_data_collator
    ),
}
SHARDED = {
    **{
        f"FSDP2, {model}, {adapter}, {'full logits' if options else 'fused'}": TrainingCase(
            model, adapter=adapter, options=options, engine=FSDP2
        )
        for model, adapter in [
            *(("llama", adapter) for adapter in ("plain", "lora", "lora_head", "saved_head")),
            *(("qwen3", adapter) for adapter in ("plain", "lora")),
            ("gemma2", "plain"),
        ]
        for options in ({}, FULL_LOGITS)
    },
    **{
        f"FSDP2 at p = {power}, {normalization}": TrainingCase(
            "llama", power, normalization, accumulation=2, engine=FSDP2
        )
        for power, normalization in WEIGHTINGS
    },
    **{
        f"rows split, p = {power}, {normalization}": TrainingCase(
            "llama",
            power,
            normalization,
            rows=36,
            filled_to=1,
            accumulation=2,
            own_weights=normalization == "batch",
            collator=WideCollator(),
            config={"num_hidden_layers": 0},
            ranks_per_row=2,
            engine=FSDP2,
        )
        for power, normalization in WEIGHTINGS
    },
    **{
        f"layers split, p = {power}, {normalization}": TrainingCase(
            "llama", power, normalization, rows=36, accumulation=2, filled_to=1, ranks_per_layer=2, options=FULL_LOGITS
        )
        for power, normalization in WEIGHTINGS
    },
    "FSDP2, weights on the first rank": TrainingCase("llama", engine=FROM_FIRST_RANK),
}
ZERO = {
    **{
        f"ZeRO-{stage} at p = {power}, {normalization}": TrainingCase(
            "llama", power, normalization, accumulation=2, options=AUTO, engine=zero(stage)
        )
        for stage in (2, 3)
        for power, normalization in WEIGHTINGS
    },
    **{
        f"ZeRO-{stage}, {model}, {adapter}": TrainingCase(model, adapter=adapter, options=AUTO, engine=zero(stage))
        for stage in (2, 3)
        for model, adapter in [("qwen3", "plain"), ("t5", "plain"), ("llama", "lora_head")]
    },
}
EVALUATIONS = {
    "padded": EvaluationCase("llama", 2.0, "sequence"),
    "weighted over the batch": EvaluationCase("llama", -1.0, "batch"),
    "encoder-decoder": EvaluationCase("t5", 2.0, "tokens"),
    "flattened": EvaluationCase("gpt2", 2.0, "sequence", DataCollatorWithFlattening()),
}
MORE_EVALUATIONS = {
    "last token": EvaluationCase("bart", math.inf, "batch"),
    "split": EvaluationCase("llama", 2.0, "batch", engine=SPLIT, batch_size=4),
    "dispatched": EvaluationCase("llama", 2.0, "batch", WideCollator(), DISPATCH),
    "generating": EvaluationCase("t5", 2.0, "sequence", generates=True),
    "generating, its last token forced": EvaluationCase("bart", 2.0, "sequence", generates=True),
}


HALF_PRECISION = {"bf16": True, **FSDP2}
ROUNDED = {
    "fused": TrainingCase("llama", engine=HALF_PRECISION),
    "full logits": TrainingCase("llama", options=FULL_LOGITS, engine=HALF_PRECISION),
}


def bins(folder: Path) -> list[dict[str, Any]]:
    """The profile that an evaluation left."""
    (profile,) = load_profiles(folder / "loss_by_position.json")
    return list(profile["bins"])
