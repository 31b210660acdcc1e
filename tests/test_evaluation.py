from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_temporal import (
    TemporalSeq2SeqTrainingArguments,
    TemporalTrainingArguments,
    TemporalWeighting,
    TemporalWeightSeq2SeqTrainer,
    TemporalWeightTrainer,
    evaluation,
    evaluation_hooks,
)
from hf_temporal.evaluation import LOGITS_AT_ONCE, load_profiles, losses_and_hits, save_profile
from tests.tiny_models import PackCollator, PadCollator, examples, tiny_model
from tests.tiny_training import token_losses

SETTINGS: dict[str, Any] = {
    "per_device_eval_batch_size": 3,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
ADDED = {f"eval_{name}_loss" for name in ("temporal", "first_token", "head", "tail", "last_token")}
TIMINGS = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}


def weight(t: int, T: int, power: float) -> float:
    return float(t == T) if math.isinf(power) else (t / T) ** power


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("power", [-1.0, 0.0, 2.0, math.inf])
@pytest.mark.parametrize("normalization", ["sequence", "batch"])
def test_evaluation_against_counting_by_hand(name: str, power: float, normalization: str, tmp_path: Path) -> None:
    model, rows = tiny_model(name), examples(name, 8)
    trainer = TemporalWeightTrainer(
        model,
        TemporalTrainingArguments(
            str(tmp_path), temporal_power=power, temporal_normalization=normalization, **SETTINGS
        ),
        eval_dataset=rows,
        data_collator=PadCollator(),
    )
    metrics = trainer.evaluate()
    by_row = token_losses(model.eval(), rows)
    latest = max(len(losses) for losses, _ in by_row)
    total = count = 0.0
    first, head, tail, last, bins = [], [], [], [], [[] for _ in range(10)]  # type: ignore[var-annotated]
    for losses, correct in by_row:
        n = len(losses)
        quarter = math.ceil(n / 4)
        first.append(losses[0])
        head += losses[:quarter]
        tail += losses[n - quarter :]
        last.append(losses[-1])
        reference = n if normalization == "sequence" else latest if power >= 0 else 1
        weights = [weight(t, reference, power) for t in range(1, n + 1)]
        if normalization == "sequence":
            weights = [w * n / sum(weights) for w in weights]
        total += sum(w * loss for w, loss in zip(weights, losses, strict=True))
        count += n if normalization == "sequence" else sum(weights)
        for t, pair in enumerate(zip(losses, correct, strict=True), start=1):
            bins[math.ceil(10 * t / n) - 1].append(pair)
    assert metrics["eval_temporal_loss"] == pytest.approx(total / count, rel=1e-5)
    ends = {"first_token": first, "head": head, "tail": tail, "last_token": last}
    for end, each in ends.items():
        assert metrics[f"eval_{end}_loss"] == pytest.approx(sum(each) / len(each), rel=1e-5)
    (profile,) = load_profiles(tmp_path / "loss_by_position.json")
    assert (profile["split"], profile["step"]) == ("eval", 0)
    for entry, pairs in zip(profile["bins"], bins, strict=True):
        assert entry["count"] == len(pairs)
        if not pairs:
            assert entry["loss"] is None
            assert entry["accuracy"] is None
            continue
        assert entry["loss"] == pytest.approx(sum(loss for loss, _ in pairs) / len(pairs), rel=1e-5)
        assert entry["accuracy"] == pytest.approx(sum(right for _, right in pairs) / len(pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [1, 200, 1 << 19])
def test_losses_and_hits_are_those_of_torch(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read at once; of equal logits the first is the largest, as `argmax` has it."""
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
    torch.manual_seed(0)
    logits, answered = (3 * torch.randn(4, 30, 50)).to(dtype), torch.rand(4, 30) < 0.7
    answers, labels = logits[answered], torch.randint(50, (int(answered.sum()),))
    labels[::2] = answers[::2].argmax(-1)
    for row in range(0, len(labels), 3):  # an equal in front of the label, or behind it
        answers[row, int(torch.randint(50, ()))] = answers[row].max()
    logits[answered] = answers
    losses, hits = losses_and_hits(logits, answered, labels)
    wide = answers if dtype == torch.float64 else answers.float()
    assert losses.equal(torch.nn.functional.cross_entropy(wide, labels, reduction="none"))
    right = answers.argmax(-1) == labels
    assert hits.equal(right)
    assert 0 < int(right.sum()) < int((answers.gather(1, labels[:, None])[:, 0] == answers.amax(-1)).sum())
    with pytest.raises(ValueError, match="labels hold 50; accepted: token ids from 0 to 49"):
        losses_and_hits(logits, answered, torch.full_like(labels, 50))


@pytest.mark.parametrize(
    ("name", "smoothing"), [("llama", 0.0), ("llama", 0.1), ("mixtral", 0.0), ("mixtral", 0.1), ("bart", 0.0)]
)
def test_no_value_of_stock_is_changed(name: str, smoothing: float, tmp_path: Path) -> None:
    rows = examples(name, 8)
    metrics = []
    kinds: list[tuple[Any, Any, dict[str, float]]] = [
        (Trainer, TrainingArguments, {}),
        (TemporalWeightTrainer, TemporalTrainingArguments, {"temporal_power": 3.0}),
    ]
    for trainer, arguments, extra in kinds:
        args = arguments(str(tmp_path), label_smoothing_factor=smoothing, **extra, **SETTINGS)
        one = trainer(tiny_model(name), args, eval_dataset=rows, data_collator=PadCollator())
        metrics.append({key: value for key, value in one.evaluate().items() if key not in TIMINGS})
    stock, ours = metrics
    assert set(ours) - set(stock) == ADDED
    assert {key: ours[key] for key in stock} == pytest.approx(stock, rel=1e-6)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of each batch whose logits the losses are read from."""
    seen: list[int] = []

    def counted(logits: torch.Tensor, *args: Any) -> Any:
        seen.append(logits.shape[:-1].numel())
        return losses_and_hits(logits, *args)

    for module in (evaluation, evaluation_hooks):
        monkeypatch.setattr(module, "losses_and_hits", counted)
    return seen


HEADS = [("llama", "lora_head"), ("gpt2", "plain"), ("gemma2", "saved_head"), ("cohere", "plain"), ("bart", "plain")]


@pytest.mark.parametrize(("name", "adapter"), HEADS)
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_logits_are_computed_of_the_targets_alone(
    name: str, adapter: str, layout: str, tmp_path: Path, computed: list[int]
) -> None:
    """The same metrics and profile, from a position of logits for each target."""
    if name == "bart" and layout != "right":
        pytest.skip("an encoder-decoder is padded on the right")
    collator = PackCollator(rows=2) if layout == "packed" else PadCollator(side=layout, extra=3)
    found = []
    for mode in ("auto", "off"):
        args = TemporalTrainingArguments(str(tmp_path / mode), temporal_fused_head=mode, **SETTINGS)
        model, rows = tiny_model(name, adapter), examples(name, 8)
        trainer = TemporalWeightTrainer(model, args, eval_dataset=rows, data_collator=collator)
        computed.clear()
        metrics = trainer.evaluate()
        assert "forward" not in vars(model.get_output_embeddings())
        profile = load_profiles(tmp_path / mode / "loss_by_position.json")[-1]["bins"]
        found.append((sum(computed), {key: metrics[key] for key in {*ADDED, "eval_loss"}}, profile))
    (few, metrics, profile), (every, expected, expected_profile) = found
    targets = sum(entry["count"] for entry in profile)
    assert targets <= few <= targets + len(rows) < every  # the trainer's own loss may count the first token of a row
    assert metrics == pytest.approx(expected, rel=1e-6)
    for entry, other in zip(profile, expected_profile, strict=True):
        numbers = {key: value for key, value in other.items() if value is not None}
        assert {key: entry[key] for key in numbers} == pytest.approx(numbers, rel=1e-6)
        assert all(entry[key] is None for key in entry.keys() - numbers.keys())


def with_logits(compute_loss: Any, *args: Any, **kwargs: Any) -> Any:
    loss, outputs = compute_loss(*args, **kwargs)
    return loss + outputs.logits.mean(), outputs


class LooksAtLogits(TemporalWeightTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return with_logits(super().compute_loss, *args, **kwargs)


class GivesShiftedLabels(PadCollator):
    """Targets that `labels` do not tell of."""

    def __call__(self, rows: Any) -> Any:
        batch = super().__call__(rows)
        batch["shift_labels"] = batch["labels"].roll(-1, 1)
        batch["shift_labels"][:, -3:] = -100
        return batch


NEEDS = (
    *(
        "own loss",
        "patched loss",
        "smoothing",
        "metrics",
        "auxiliary loss",
        "hook",
        "hook on the head",
        "virtual tokens",
    ),
    *("shifted labels", "compiled", "rounded loss", "new head"),
)


@pytest.mark.parametrize("why", NEEDS)
def test_all_logits_are_computed_where_somebody_needs_them(
    why: str, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is then that of the trainer without our own way, and what is looked at is complete."""
    name = {"auxiliary loss": "mixtral", "rounded loss": "bart"}.get(why, "llama")
    rows = [{**row, "labels": [*row["input_ids"]]} if why == "virtual tokens" else row for row in examples(name, 3)]
    collator = GivesShiftedLabels() if why == "shifted labels" else PadCollator()
    losses, seen = [], []
    for mode in ("off", "auto"):
        args = TemporalTrainingArguments(
            str(tmp_path),
            temporal_fused_head=mode,
            temporal_power=0.0,
            label_smoothing_factor=0.1 if why == "smoothing" else 0.0,
            bf16_full_eval=why == "rounded loss",
            remove_unused_columns=False,
            **SETTINGS,
        )
        model: Any = tiny_model(name)
        if why == "virtual tokens":
            model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
            model.prompt_encoder["default"].embedding.weight.data.copy_(torch.arange(64.0).view(4, 16) / 32 - 1)
        how: dict[str, Any] = {"compute_metrics": lambda _: {}} if why == "metrics" else {}
        kind = LooksAtLogits if why == "own loss" else TemporalWeightTrainer
        trainer = kind(model, args, eval_dataset=rows, data_collator=collator, **how)
        if why == "patched loss":
            monkeypatch.setattr(trainer, "compute_loss", functools.partial(with_logits, trainer.compute_loss))
        if why == "compiled":
            model.compile(backend="eager")
        if why.startswith("hook"):
            watched = model if why == "hook" else model.get_output_embeddings()
            watched.register_forward_hook(lambda *call: seen.append(call[-1]))
        if why == "new head":
            trainer.evaluate()
            model.set_output_embeddings(torch.nn.Linear(16, 97, bias=False))
            model.get_output_embeddings().weight.data.copy_(torch.arange(97 * 16.0).view(97, 16).sin())
        computed.clear()
        metrics = trainer.evaluate()
        losses.append(metrics["eval_loss"])
        if why == "new head":
            assert metrics["eval_tail_loss"] > 0
        else:
            assert "eval_tail_loss" in metrics
            assert computed == [3 * 6 if name == "bart" else 3 * 12]
    assert losses[0] == losses[1] if why != "new head" else losses[0] == pytest.approx(losses[1], rel=1e-6)
    if why.startswith("hook"):
        *_, output = seen
        assert (output if why == "hook on the head" else output.logits).shape[:2] == (3, 12)


def test_the_head_is_as_before_when_a_model_fails_in_an_evaluation(tmp_path: Path) -> None:
    model = tiny_model("llama")
    args = TemporalTrainingArguments(str(tmp_path), **SETTINGS)
    trainer = TemporalWeightTrainer(model, args, eval_dataset=examples("llama", 3), data_collator=PadCollator())
    trainer.evaluate()

    def fails(*_: Any) -> None:
        raise RuntimeError("no memory")

    handle = model.lm_head.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.evaluate()
    handle.remove()
    assert "forward" not in vars(model.lm_head)
    assert "eval_loss" in trainer.evaluate()


def test_label_smoothing_where_stock_leaves_the_decoder_without_inputs(tmp_path: Path) -> None:
    rows = examples("bart", 6)
    args = TemporalTrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **SETTINGS)
    model = tiny_model("bart").eval()
    metrics = TemporalWeightTrainer(model, args, eval_dataset=rows, data_collator=PadCollator()).evaluate()
    batch_losses = []
    for start in (0, 3):
        batch = PadCollator()(rows[start : start + 3])
        with torch.no_grad():
            log_p = model(**batch).logits.double().log_softmax(-1)
        on = batch["labels"] != -100
        nll = -log_p[on].gather(-1, batch["labels"][on][:, None])[:, 0]
        batch_losses.append((0.9 * nll - 0.1 * log_p[on].mean(-1)).mean().item())
    assert metrics["eval_loss"] == pytest.approx(sum(batch_losses) / 2, rel=1e-5)


def test_generation_gets_no_extra_keys_and_keeps_the_profile(tmp_path: Path) -> None:
    rows: list[Any] = [{**row, "loss_weights": [1.0] * len(row["labels"])} for row in examples("t5", 7)]
    metrics = []
    kinds: list[tuple[Any, Any]] = [
        (Seq2SeqTrainer, Seq2SeqTrainingArguments),
        (TemporalWeightSeq2SeqTrainer, TemporalSeq2SeqTrainingArguments),
    ]
    for trainer, arguments in kinds:
        args = arguments(str(tmp_path), predict_with_generate=True, generation_max_length=6, **SETTINGS)
        plain = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
        one = trainer(
            tiny_model("t5"),
            args,
            eval_dataset=plain if trainer is Seq2SeqTrainer else rows,
            data_collator=PadCollator(),
            compute_metrics=lambda prediction: {"tokens": float(prediction.predictions.sum())},
        )
        metrics.append({key: value for key, value in one.evaluate().items() if key not in TIMINGS})
    stock, ours = metrics
    assert set(ours) - set(stock) == ADDED
    assert {key: ours[key] for key in stock} == stock
    by_row = token_losses(one.model.eval(), rows)
    heads = [loss for losses, _ in by_row for loss in losses[: math.ceil(len(losses) / 4)]]
    assert ours["eval_head_loss"] == pytest.approx(sum(heads) / len(heads), rel=1e-5)


@pytest.mark.parametrize("normalization", ["sequence", "batch", "tokens"])
def test_packing_changes_no_weighted_value(normalization: str, tmp_path: Path) -> None:
    values = []
    for collator in (PadCollator(), PadCollator(side="left", extra=2), PackCollator(rows=2)):
        args = TemporalTrainingArguments(
            str(tmp_path), temporal_power=2.0, temporal_normalization=normalization, **SETTINGS
        )
        trainer = TemporalWeightTrainer(
            tiny_model("gpt2"), args, eval_dataset=examples("gpt2", 6), data_collator=collator
        )
        metrics = trainer.evaluate()
        values.append([metrics[key] for key in sorted(ADDED)])
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-5)


def test_loss_weights_enter_the_weighted_loss_alone(tmp_path: Path) -> None:
    model, rows = tiny_model("llama"), examples("llama", 4)
    scaled: list[dict[str, Any]] = [
        {**row, "loss_weights": [0.5 * i for i in range(len(row["labels"]))]} for row in rows
    ]
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=0.0, **SETTINGS)
    metrics = TemporalWeightTrainer(model, args, eval_dataset=scaled, data_collator=PadCollator()).evaluate()
    plain = TemporalWeightTrainer(model, args, eval_dataset=rows, data_collator=PadCollator()).evaluate()
    total = count = 0.0
    for row, (losses, _) in zip(scaled, token_losses(model.eval(), rows), strict=True):
        labels, own = row["labels"][1:], row["loss_weights"][1:]
        weights = [w for w, label in zip(own, labels, strict=True) if label != -100]
        total += sum(w * loss for w, loss in zip(weights, losses, strict=True))
        count += sum(weights)
    assert metrics["eval_temporal_loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval_loss"] == plain["eval_loss"]
    assert metrics["eval_tail_loss"] == plain["eval_tail_loss"]


def test_several_evaluation_sets_and_a_test_set(tmp_path: Path) -> None:
    rows: Any = examples("llama", 6)
    trainer = TemporalWeightTrainer(
        tiny_model("llama"),
        TemporalTrainingArguments(str(tmp_path), **SETTINGS),
        eval_dataset={"a": rows[:3], "b": rows[3:]},
        data_collator=PadCollator(),
    )
    metrics = trainer.evaluate()
    assert {"eval_a_head_loss", "eval_b_tail_loss", "eval_a_temporal_loss"} <= set(metrics)
    assert "test_head_loss" in (trainer.predict(rows).metrics or {})
    splits = [profile["split"] for profile in load_profiles(tmp_path / "loss_by_position.json")]
    assert splits == ["eval_a", "eval_b", "test"]


def test_profiles_of_later_steps_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "loss_by_position.json"
    for step in (0, 5, 10):
        save_profile(path, split="eval", step=step, bins=[])
    save_profile(path, split="test", step=0, bins=[])
    save_profile(path, split="eval", step=5, bins=[{"from": 0.0}])
    kept = [(profile["split"], profile["step"], len(profile["bins"])) for profile in load_profiles(path)]
    assert kept == [("eval", 0, 0), ("test", 0, 0), ("eval", 5, 1)]
    assert [file.name for file in tmp_path.iterdir()] == ["loss_by_position.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"version": 2, "profiles": []}'])
def test_other_files_are_no_profiles(content: str, tmp_path: Path) -> None:
    path = tmp_path / "loss_by_position.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is not a loss_by_position\.json of version 1"):
        load_profiles(path)


def test_final_power_is_evaluated_whatever_is_in_force(tmp_path: Path) -> None:
    args = TemporalTrainingArguments(
        str(tmp_path), temporal_power=4.0, temporal_power_schedule="linear", max_steps=4, **SETTINGS
    )
    rows = examples("llama", 4)
    scheduled = TemporalWeightTrainer(tiny_model("llama"), args, eval_dataset=rows, data_collator=PadCollator())
    constant = TemporalWeightTrainer(
        tiny_model("llama"),
        TrainingArguments(str(tmp_path), **SETTINGS),
        eval_dataset=rows,
        data_collator=PadCollator(),
        weighting=TemporalWeighting(4.0),
    )
    assert scheduled.evaluate()["eval_temporal_loss"] == constant.evaluate()["eval_temporal_loss"]


def test_profile_file_is_plain_json(tmp_path: Path) -> None:
    trainer = TemporalWeightTrainer(
        tiny_model("llama"),
        TemporalTrainingArguments(str(tmp_path), **SETTINGS),
        eval_dataset=examples("llama", 2),
        data_collator=PadCollator(),
    )
    trainer.evaluate()
    content = json.loads((tmp_path / "loss_by_position.json").read_text())
    assert content["version"] == 1
    assert [(entry["from"], entry["to"]) for entry in content["profiles"][0]["bins"]][-1] == (0.9, 1.0)
