"""Modes of precision and memory: a few steps in each, against the same steps in plain float32."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer
from hf_temporal.model import fused_head, weighted_loss
from tests.tiny_models import SEQ2SEQ, Example, examples, tiny_model
from tests.tiny_training import Steps, distance, norm, train

pytestmark = pytest.mark.usefixtures("sixteen_bits_are_native")

RATE = 0.01
SMALL_RATE = 1e-3  # in 16 bits: larger steps, with gradients as steep as these, magnify what rounding there is
STEPS = 3
NEEDS_ONE_GPU = pytest.mark.skipif(
    torch.cuda.device_count() != 1, reason="one GPU would run the same steps with CUDA's kernels and gradient scaler"
)
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_ONE_GPU)]

Plain = Callable[..., Steps]


def steps_of(
    model: Any, rows: list[Example], folder: Path, *, trainer: type[Trainer] = TemporalWeightTrainer, **options: Any
) -> Steps:
    """Three steps of two micro-batches of two uneven rows each, prompts masked, at p = 2."""
    settings: dict[str, Any] = {
        "batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": RATE,
    }  # fmt: skip
    arguments: type[TrainingArguments] = TrainingArguments
    if issubclass(trainer, TemporalWeightTrainer):
        arguments, settings = TemporalTrainingArguments, {**settings, "temporal_power": 2.0}
    return train(trainer, arguments, model, rows, folder, **{**settings, **options})


def twelve(name: str) -> list[Example]:
    return examples(name, 4 * STEPS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """The steps in float32, each kind of them once."""

    @functools.cache
    def run(name: str, adapter: str = "plain", **options: Any) -> Steps:
        folder = tmp_path_factory.mktemp("plain")
        return steps_of(tiny_model(name, adapter), twelve(name), folder, **options)

    return run


def logged(steps: Steps, name: str) -> list[float]:
    return [logs[name] for logs in steps.logs if name in logs]


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("_orig_mod."): value for key, value in tensors.items()}


def assert_same(steps: Steps, expected: Steps, *, tolerance: float = 1e-5) -> None:
    assert norm(expected.update) > RATE / 10
    assert logged(steps, "loss") == pytest.approx(logged(expected, "loss"), rel=tolerance)
    assert logged(steps, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=tolerance)
    for name in ("effective_sample_size", "temporal_power"):
        assert logged(steps, name) == logged(expected, name)
    assert len(steps.gradients) == len(expected.gradients) == STEPS
    for ours, theirs in zip(steps.gradients, expected.gradients, strict=True):
        assert distance(without_prefix(ours), theirs) < tolerance
    assert distance(steps.update, expected.update) < tolerance


# ---- memory: the numbers of float32


class Offloading(TemporalWeightTrainer):
    """Keeps what autograd saves in the host's memory, as TRL's `activation_offloading` does."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with save_on_cpu():
            return super().training_step(*args, **kwargs)


def checkpointing(**how: Any) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": how}


MODES = {
    "reentrant checkpoints": checkpointing(use_reentrant=True),
    "checkpoints": checkpointing(use_reentrant=False),
    "offloading": {"trainer": Offloading},
}


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_saves_memory_changes_no_number(name: str, mode: str, fused: str, plain: Plain, tmp_path: Path) -> None:
    steps = steps_of(tiny_model(name), twelve(name), tmp_path, temporal_fused_head=fused, **MODES[mode])
    assert_same(steps, plain(name, temporal_fused_head=fused))


@NEEDS_ONE_GPU
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_checkpoints_in_the_memory_of_the_host(name: str, plain: Plain, tmp_path: Path) -> None:
    """The only offloading that `Trainer` has; without a GPU transformers raises, for want of pinned memory."""
    device: dict[str, Any] = {"use_cpu": False, "temporal_fused_head": "on"}
    steps = steps_of(tiny_model(name), twelve(name), tmp_path, **device, **checkpointing(offload=True))
    assert_same(steps, plain(name, **device))


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_device_changes_no_number(name: str, fused: str, plain: Plain, tmp_path: Path) -> None:
    """Without a GPU both are the CPU."""
    if torch.cuda.device_count() > 1:
        pytest.skip("nn.DataParallel is refused")
    steps = steps_of(tiny_model(name), twelve(name), tmp_path, temporal_fused_head=fused, use_cpu=False)
    on_gpu = torch.cuda.is_available()
    assert_same(steps, plain(name, temporal_fused_head=fused), tolerance=1e-4 if on_gpu else 1e-5)


@pytest.mark.parametrize("mode", ["reentrant checkpoints", "checkpoints"])
@pytest.mark.parametrize(
    ("name", "adapter"), [("llama", "lora"), ("llama", "lora_head"), ("llama", "saved_head"), ("t5", "lora_head")]
)
def test_adapters_under_checkpoints_meet_the_head_once(
    name: str, adapter: str, mode: str, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, calls = plain(name, adapter, temporal_fused_head="on"), []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return lm_head_loss(*args, **kwargs)

    lm_head_loss = fused_head.weighted_linear_cross_entropy_terms
    monkeypatch.setattr(fused_head, "weighted_linear_cross_entropy_terms", counted)
    model = tiny_model(name, adapter)
    steps = steps_of(model, twelve(name), tmp_path, temporal_fused_head="on", **MODES[mode])
    assert len(calls) == 2 * STEPS
    assert_same(steps, expected)


class Whole(LlamaForCausalLM):
    """One checkpoint around all of it, the head included."""

    reentrant = False

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **others: Any
    ) -> Any:
        def run(embeds: Tensor) -> Any:
            return super(Whole, self).forward(
                inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, **others
            )

        embeds = self.get_input_embeddings()(input_ids)
        return checkpoint(run, embeds, use_reentrant=self.reentrant) if self.training else run(embeds)


def whole_checkpoint(*, reentrant: bool) -> Whole:
    llama = tiny_model("llama")
    model = Whole(llama.config)
    model.load_state_dict(llama.state_dict())
    model.reentrant = reentrant
    return model


def test_a_checkpoint_around_the_head(plain: Plain, tmp_path: Path) -> None:
    steps = steps_of(whole_checkpoint(reentrant=False), twelve("llama"), tmp_path, temporal_fused_head="on")
    assert_same(steps, plain("llama", temporal_fused_head="on"))


def test_a_reentrant_checkpoint_around_the_head_is_refused(tmp_path: Path) -> None:
    """It runs the head without gradients, which the fused head could not make a second time."""
    with pytest.raises(RuntimeError, match=r"LM head of Whole ran without gradients.*temporal_fused_head='off'"):
        steps_of(whole_checkpoint(reentrant=True), twelve("llama"), tmp_path, temporal_fused_head="on")


@pytest.mark.parametrize("fused", ["on", "off"])
def test_a_compiled_model(fused: str, plain: Plain, tmp_path: Path) -> None:
    """AOT autograd's graphs, forward and backward; what inductor makes of them in C++ is left out, for time."""
    torch._dynamo.reset()
    steps = steps_of(
        tiny_model("llama"), twelve("llama"), tmp_path, temporal_fused_head=fused, torch_compile=True,
        torch_compile_backend="aot_eager",
    )  # fmt: skip
    assert_same(steps, plain("llama", temporal_fused_head=fused))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("name", "fused"), [("llama", "on"), ("llama", "off"), ("t5", "on")])
def test_out_of_memory_leaves_nothing_behind(name: str, fused: str, first: int, plain: Plain, tmp_path: Path) -> None:
    """From four rows to three to two, the accumulation kept: the run of two rows, its denominator and its logs.

    Memory runs out inside the model, in the first or in the second micro-batch.
    """
    forwards: list[int] = []

    def run_out(_: Any, inputs: tuple[Tensor, ...]) -> None:
        forwards.append(len(inputs[0]))
        if forwards[-1] > 2 and forwards.count(forwards[-1]) > first:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = tiny_model(name)
    (model.decoder.block if name in SEQ2SEQ else model.model.layers)[-1].register_forward_pre_hook(run_out)
    steps = steps_of(model, twelve(name), tmp_path, temporal_fused_head=fused, batch_size=4, auto_find_batch_size=True)
    assert [rows for rows in forwards if rows > 1] == [4] * (first + 1) + [3] * (first + 1) + [2] * 2 * STEPS
    assert_same(steps, plain(name, temporal_fused_head=fused))


# ---- precision: float32's numbers as closely as the precision allows


@contextlib.contextmanager
def sums_checked(monkeypatch: pytest.MonkeyPatch, *, fused: str) -> Iterator[list[float]]:
    """Collects by how much, relatively, each Σ wℓ is off float64's, given the same logits or hidden states.

    Float64 takes the bfloat16 logits as they are; those of the fused head are made from its hidden states, and an odd
    one of them may be rounded the other way.
    """
    errors: list[float] = []
    owner, name = (
        (fused_head, "weighted_linear_cross_entropy_terms")
        if fused == "on"
        else (weighted_loss, "weighted_cross_entropy")
    )
    own = getattr(owner, name)

    def checked(first: Any, labels: Tensor, weights: Tensor, **options: Any) -> Any:
        result = own(first, labels, weights, **options)
        with torch.no_grad():
            logits = F.linear(first[0][0].bfloat16(), first[0][1].bfloat16()) if fused == "on" else first
            losses = F.cross_entropy(logits.double().flatten(0, -2), labels.flatten(), reduction="none")
            exact = float((losses * weights.flatten()).sum())
        errors.append(abs(float((result if fused == "on" else result[0]).detach()) / exact - 1))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, checked)
        yield errors


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bf16(name: str, weights: str, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast with float32 weights; bfloat16 weights.

    What follows the bfloat16 logits is rounded as float32 is: summed in bfloat16, the loss would be off by 2^-9. The
    gradients are off by what the model's own layers are, of which stock's runs at p = 0 give the size: twice the
    largest of three batches, since the weights leave a smaller sample for rounding errors to cancel in. The update
    is compared under autocast alone; a bfloat16 weight is itself rounded by more than these steps move it.
    """
    autocast = weights == "float32"
    rows, model = twelve(name), tiny_model(name).to(getattr(torch, weights))
    rate: dict[str, Any] = {"learning_rate": SMALL_RATE}
    exact, stock, unweighted = (
        plain(name, **rate),
        plain(name, trainer=Trainer, **rate),
        plain(name, temporal_power=0.0, **rate),
    )
    stock_steps = steps_of(model, rows, tmp_path, trainer=Trainer, bf16=autocast, **rate)
    bound = 2 * max(map(distance, stock_steps.gradients, stock.gradients))
    for fused in ("on", "off"):
        with sums_checked(monkeypatch, fused=fused) as errors:
            steps = steps_of(model, rows, tmp_path, temporal_fused_head=fused, bf16=autocast, **rate)
        assert len(errors) == 2 * STEPS
        assert max(errors) < (1e-4 if fused == "on" else 1e-6)
        for ours, theirs, without in zip(steps.gradients, exact.gradients, unweighted.gradients, strict=True):
            assert distance(ours, theirs) < bound < distance(without, theirs)
        if autocast:
            assert distance(steps.update, exact.update) < bound


class _Scaling:
    """A gradient scaler of one's own start, on the CPU too, where transformers' `fp16` does nothing."""

    start = 2.0**10
    scaled: list[Tensor]

    def create_accelerator_and_postprocess(self: Any) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.scaled = []
        scaler = torch.amp.GradScaler(self.args.device.type, init_scale=self.start, backoff_factor=2.0**-30)
        scale = scaler.scale

        def noted(loss: Tensor) -> Any:
            self.scaled.append(loss.detach())
            return scale(loss)

        scaler.scale = noted  # type: ignore[assignment,method-assign]
        self.accelerator.scaler, self.accelerator.native_amp = scaler, True


class ScalingStock(_Scaling, Trainer):
    pass


class Scaling(_Scaling, TemporalWeightTrainer):
    pass


class ScalingTooFar(Scaling):
    """Its first step overflows; the next ones are scaled by 2^10."""

    start = 2.0**40


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_fp16_with_the_gradient_scaler(name: str, device: str, plain: Plain, tmp_path: Path) -> None:
    """The scaler is given our loss; as in bfloat16, the gradients are off by no more than twice what stock's are."""
    rows, model = twelve(name), tiny_model(name)
    on: dict[str, Any] = {"use_cpu": device == "cpu", "learning_rate": SMALL_RATE}
    exact, stock = plain(name, **on), plain(name, trainer=Trainer, **on)
    stock_steps = steps_of(model, rows, tmp_path, trainer=ScalingStock, fp16=True, **on)
    bound = 2 * max(map(distance, stock_steps.gradients, stock.gradients))
    for fused in ("on", "off"):
        steps = steps_of(model, rows, tmp_path, trainer=Scaling, temporal_fused_head=fused, fp16=True, **on)
        ours: Any = steps.trainer
        assert ours.accelerator.scaler.get_scale() == Scaling.start
        scaled = torch.stack(ours.scaled).view(STEPS, 2).sum(1)
        assert scaled.tolist() == pytest.approx(logged(steps, "loss"), rel=1e-6)
        assert max(map(distance, steps.gradients, exact.gradients)) < bound
        assert distance(steps.update, exact.update) < bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", ["on", "off"])
def test_a_step_that_overflows_is_skipped(fused: str, device: str, tmp_path: Path) -> None:
    rows, model = twelve("llama"), tiny_model("llama")
    on: dict[str, Any] = {"use_cpu": device == "cpu", "fp16": True, "temporal_fused_head": fused}
    steps = steps_of(model, rows, tmp_path, trainer=ScalingTooFar, **on)
    after = steps_of(model, rows[4:], tmp_path, trainer=Scaling, **on, max_steps=STEPS - 1)
    ours: Any = steps.trainer
    assert ours.accelerator.scaler.get_scale() == Scaling.start
    assert not all(gradient.isfinite().all() for gradient in steps.gradients[0].values())
    assert distance(steps.update, after.update) < 1e-6
