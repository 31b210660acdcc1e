"""One model: a step of the Trainer and of ours in four layouts, against float64."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer

from .answers import answers
from .shrink import DATA_BELOW, tiny

IGNORE = -100
POWER = 2.0
LAYOUTS = ("right", "left", "packed", "accumulated")
CLOSE = 2e-4
NEEDS_TYPES = ("Molmo2ForConditionalGeneration",)  # mm_token_type_ids in training, of text alone as well
Row = dict[str, Any]


@dataclass
class Found:
    """What a layout shows: how stock and ours stand at p = 0 and p = 2, in a phrase each."""

    stock: str = ""
    zero: str = ""
    weighted: str = ""


@dataclass
class Report:
    kind: str
    reason: str = ""  # why it was not run
    layouts: dict[str, Found] = field(default_factory=dict)
    answers: str = ""  # how they are generated; empty for an encoder–decoder and a model that needs an image


@dataclass
class Step:
    """The loss that was logged and the gradients of one optimizer step, or the error."""

    loss: float = math.nan
    gradient: Tensor | None = None
    error: Exception | None = None

    def is_close(self, other: Step) -> bool:
        if self.gradient is None or other.gradient is None:
            return False
        far = (self.gradient - other.gradient).norm() / other.gradient.norm().clamp(min=1e-12)
        return abs(self.loss - other.loss) <= CLOSE * abs(other.loss) + 1e-6 and float(far) <= 20 * CLOSE


class Rows:
    """Rows for a model and their collation; encoder–decoders get a source, of tokens or features."""

    def __init__(self, model: Any) -> None:
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        self.kind = type(model).__name__
        self.parameters = inspect.signature(model.forward).parameters
        self.main = model.main_input_name if self.seq2seq else "input_ids"
        generator = torch.Generator().manual_seed(0)
        needs_image = self.parameters.get("pixel_values")
        self.images = not self.seq2seq and needs_image is not None and needs_image.default is inspect.Parameter.empty
        self.makes_decoder_inputs: Any = None
        self.rows: list[Row] = []
        for length in (9, 5, 7, 12):
            tokens = torch.randint(3, DATA_BELOW, (length,), generator=generator).tolist()
            labels = [IGNORE] * (length % 3) + tokens[length % 3 :]
            row: Row = {"input_ids": tokens, "labels": labels}
            if self.seq2seq:
                source = torch.randint(3, DATA_BELOW, (4 + length % 4,), generator=generator).tolist()
                row = {"input_ids": source, "labels": tokens}
                if self.main != "input_ids":
                    row[self.main] = features(model, self.main, generator)
            elif self.images:
                row["pixel_values"] = features(model, "pixel_values", generator)
            self.rows.append(row)

    def collate(self, rows: list[Row], side: str = "right") -> dict[str, Tensor]:
        batch = {"labels": _padded([row["labels"] for row in rows], IGNORE, side)}
        if self.makes_decoder_inputs is not None:
            batch["decoder_input_ids"] = self.makes_decoder_inputs(labels=batch["labels"])
        if self.kind in NEEDS_TYPES:
            batch["mm_token_type_ids"] = torch.zeros_like(batch["labels"])
        if self.images:
            batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
        if self.main in rows[0] and self.main != "input_ids":
            return batch | {self.main: torch.stack([row[self.main] for row in rows])}
        batch["input_ids"] = _padded([row["input_ids"] for row in rows], 0, side)
        if "attention_mask" in self.parameters:
            batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], 0, side)
        return batch


def features(model: Any, name: str, generator: torch.Generator) -> Tensor:
    """Random features of an audio or image, of the shape that the configuration tells."""
    parts = ("encoder", "encoder_config", "audio_config", "vision_config")
    config = next((part for name in parts if (part := getattr(model.config, name, None)) is not None), model.config)
    if name == "input_values":
        return torch.randn(4000, generator=generator)
    if name == "pixel_values":
        size = getattr(config, "image_size", 32)
        size = (size, size) if isinstance(size, int) else tuple(size)
        return torch.randn(getattr(config, "num_channels", 3), *size, generator=generator)
    if name == "flattened_patches":
        channels = getattr(model.config.vision_config, "patch_embed_hidden_size", 768)
        patches = torch.randn(6, channels + 2, generator=generator)
        patches[:, :2] = torch.tensor([[i // 3 + 1, i % 3 + 1] for i in range(6)])
        return patches
    names = ("feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel")
    bins = next((size for name in names if (size := getattr(config, name, None))), 80)
    if type(model).__name__.startswith("Whisper"):
        return torch.randn(bins, 2 * config.max_source_positions, generator=generator)
    return torch.randn(40, bins, generator=generator)


def _padded(rows: list[list[int]], value: int, side: str) -> Tensor:
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for f, r in zip(fill, rows, strict=True)])


def examine(kind: str) -> Report:
    """Everything about one class."""
    said = ""
    try:
        for model in tiny(kind):
            try:
                rows = Rows(model)
                scramble(model, rows)
                try:
                    alignment = own_alignment(model, rows)
                except ValueError:
                    if not (rows.seq2seq and hasattr(model, "prepare_decoder_input_ids_from_labels")):
                        raise
                    rows.makes_decoder_inputs = model.prepare_decoder_input_ids_from_labels
                    alignment = own_alignment(model, rows)
            except Exception as error:  # noqa: BLE001
                said = said or _said(error)
                continue
            layouts = dict(_layouts(model, rows, alignment))
            return Report(kind, layouts=layouts, answers="" if rows.seq2seq or rows.images else _answers(model))
    except RuntimeError as error:
        return Report(kind, said or str(error))
    return Report(kind, said or "no sizes fit")


def _answers(model: Any) -> str:
    try:
        return answers(model)
    except Exception as error:  # noqa: BLE001
        return _said(error)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def scramble(model: Any, rows: Rows) -> None:
    """Weights large enough for the tokens' losses to differ, as long as the logits stay finite."""
    before = copy.deepcopy(model.state_dict())
    for std in (0.2, 0.08, None):
        torch.manual_seed(1)
        model.load_state_dict(before)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if (
                    std is not None
                    and parameter.dim() > 1
                    and not any(key in name for key in ("A_log", "dt_", "conv"))
                ):
                    parameter.normal_(std=std)
        batch = rows.collate(rows.rows)
        labels = batch.pop("labels")
        if rows.seq2seq:  # a decoder wants something
            batch["decoder_input_ids"] = labels.clamp(min=0)
        with torch.no_grad():
            logits = model(**batch)["logits"]
        if logits.isfinite().all() and logits.abs().max() < 100:
            return
    raise ValueError("logits that are not finite")


def losses(logits: Tensor, labels: Tensor, shifts: bool) -> tuple[Tensor, Tensor]:
    """Σ over nothing: each label's cross-entropy and whether it is a target."""
    if shifts:
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return each.view(labels.shape), labels != IGNORE


def own_alignment(model: Any, rows: Rows) -> bool | None:
    """Whether the model's own loss shifts labels; None where it is no cross-entropy of its logits, one by one."""
    batch = rows.collate(rows.rows)
    with torch.no_grad():
        outputs = model(**batch)
    if outputs.get("loss") is None:
        raise ValueError("no loss for labels")
    if outputs["logits"].shape[:2] != batch["labels"].shape:
        return None
    for shifts in (False, True):
        each, targets = losses(outputs["logits"], batch["labels"], shifts)
        if torch.isclose(each.sum() / targets.sum(), outputs["loss"], rtol=1e-4, atol=1e-6):
            return shifts
    return None


def _layouts(model: Any, rows: Rows, shifts: bool | None) -> Iterator[tuple[str, Found]]:
    @functools.cache
    def alone(layout: str) -> dict[float, Step]:
        if shifts is None:
            return {}
        return {power: reference(model, rows, layout, shifts, power, alone=True) for power in (0.0, POWER)}

    for layout in LAYOUTS:
        if rows.seq2seq and layout in ("left", "packed"):
            continue
        yield layout, _examine_layout(model, rows, layout, shifts, alone("packed" if layout == "packed" else "right"))


def _collator(rows: Rows, layout: str) -> Any:
    if layout == "packed":
        return DataCollatorWithFlattening(return_tensors="pt")
    return lambda some: rows.collate(some, "left" if layout == "left" else "right")


def _examine_layout(model: Any, rows: Rows, layout: str, shifts: bool | None, alone: dict[float, Step]) -> Found:
    found = Found()
    stock, zero, weighted = (train(model, rows, layout, kind, power) for kind, power in (
        (Trainer, 0.0), (TemporalWeightTrainer, 0.0), (TemporalWeightTrainer, POWER)))  # fmt: skip

    @functools.cache
    def batchwise(power: float) -> Step:
        assert shifts is not None
        return reference(model, rows, layout, shifts, power, alone=False)

    found.stock = _stand(stock, alone, batchwise, 0.0)
    found.zero = "as stock" if _same(zero, stock) else _stand(zero, alone, batchwise, 0.0)
    found.weighted = _stand(weighted, alone, batchwise, POWER)
    return found


def _same(one: Step, other: Step) -> bool:
    if one.error is not None and other.error is not None:
        return str(one.error) == str(other.error)
    return one.is_close(other)


def _stand(step: Step, alone: dict[float, Step], batchwise: Callable[[float], Step], power: float) -> str:
    if step.error is not None:
        told = isinstance(step.error, (ValueError, TypeError)) and "ccepted" in str(step.error)
        return f"refused: {step.error}" if told else f"raised {_said(step.error)}"
    if power not in alone:
        return "a loss of its own"
    if step.is_close(right := alone[power]):
        return "exact"
    if step.is_close(batchwise(power)):
        return "exact for the batch's logits"
    if right.error is not None:
        return f"no reference: {_said(right.error)}"
    return f"loss {step.loss / right.loss:.4g} ×"


class _Keeper(TrainerCallback):
    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
        self.gradient = gradient_of(given["model"])


def gradient_of(model: nn.Module) -> Tensor:
    each = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([grad.flatten().double() for grad in each])


def train(model: Any, rows: Rows, layout: str, kind: Any, power: float) -> Step:
    """One optimizer step of a trainer."""
    model, keeper = copy.deepcopy(model), _Keeper()
    micro = 2 if layout == "accumulated" else 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.manual_seed(3)
            args = TemporalTrainingArguments(
                folder, max_steps=1, per_device_train_batch_size=4 // micro, gradient_accumulation_steps=micro,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
                max_grad_norm=1e9, remove_unused_columns=False, temporal_power=power, learning_rate=1e-3,
            )  # fmt: skip
            one = kind(model, args, train_dataset=rows.rows, data_collator=_collator(rows, layout), callbacks=[keeper])
            one._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows.rows)
            one.train()
        except Exception as error:  # noqa: BLE001
            return Step(error=error)
    loss = next(entry["loss"] for entry in one.state.log_history if "loss" in entry)
    return Step(loss, keeper.gradient)


@torch.no_grad()
def is_wide(model: Any, rows: Rows) -> bool:
    """Whether float64 gives the model's logits more exactly; not where its code rounds them to bfloat16 in between."""
    found = []
    for dtype in (torch.float32, torch.float64):
        batch = rows.collate(rows.rows)
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        try:
            found.append(copy.deepcopy(model).to(dtype).train()(**inputs)["logits"].double())
        except Exception:  # noqa: BLE001  whatever a model raises on a dtype that it was not written for
            return False
    return torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-3 * float(found[1].abs().max()))


def reference(model: Any, rows: Rows, layout: str, shifts: bool, power: float, *, alone: bool) -> Step:
    """The loss and its gradients in float64; from the model's own logits where it cannot compute in float64.

    Args:
        alone: takes the logits of each row by itself, else those of the micro-batches as they are trained.
    """
    size = 2 if layout == "accumulated" else 4
    batches = [_collator(rows, layout)(rows.rows[start : start + size]) for start in range(0, 4, size)]
    if alone:
        batches = [rows.collate([row]) for row in rows.rows]
        if layout == "packed":  # whose collator leaves out the first label, a target where the model shifts none
            batches = [batch | {"labels": batch["labels"].index_fill(1, torch.tensor(0), IGNORE)} for batch in batches]
    step = Step()
    for dtype in (torch.float64, torch.float32) if is_wide(model, rows) else (torch.float32,):
        wide = copy.deepcopy(model).to(dtype).train()
        try:
            total, count = torch.zeros((), dtype=torch.float64), 0
            for batch in batches:
                inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
                each, targets = losses(wide(**inputs)["logits"].double(), batch["labels"], shifts)
                for mine in _documents(batch, targets, shifts):
                    weights = torch.arange(1, int(mine.sum()) + 1, dtype=torch.float64) ** power
                    total = total + (weights / weights.mean() * each[mine]).sum()
                    count += len(weights)
            (total / count).backward()
            return Step(float(total.detach() / count), gradient_of(wide))
        except Exception as error:  # noqa: BLE001  whatever a model raises on a dtype that it was not written for
            step = Step(error=error)
    return step


def _documents(batch: dict[str, Tensor], targets: Tensor, shifts: bool) -> Iterator[Tensor]:
    """The places of each document's targets, in a batch of rows that are padded or packed."""
    documents = torch.zeros_like(targets, dtype=torch.long)
    if "position_ids" in batch:
        documents = (batch["position_ids"] == 0).cumsum(1)
        if shifts:
            targets[:, :-1] &= documents[:, 1:] == documents[:, :-1]
    elif shifts and "attention_mask" in batch:  # the first token is no target, though padding stands before it
        targets &= batch["attention_mask"] != 0
    for row, ids in enumerate(documents):
        for document in ids.unique():
            mine = torch.zeros_like(targets)
            mine[row] = targets[row] & (ids == document)
            if mine.any():
                yield mine
