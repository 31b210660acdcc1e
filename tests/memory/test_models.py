"""Every family, for regression and for tokens: what it computes, how it starts, its loss and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import set_seed

from hf_temporal.memory.models import FAMILIES
from hf_temporal.model.model_loss import read_model_loss
from tests.memory import references

KINDS = ("regression", "tokens")
BOTH = pytest.mark.parametrize("kind", KINDS)
EVERY = pytest.mark.parametrize("family", FAMILIES)
VOCABULARY = 12
SMALL: dict[str, dict[str, Any]] = {
    "linear_rnn": {},
    "tanh_rnn": {},
    "tcn": {"num_hidden_layers": 2, "kernel_size": 3},
    "state_space": {"state_size": 3, "largest_step": 0.5, "smallest_step": 0.1},
    "attention": {"intermediate_size": 12},
}


def small(family: str, kind: str, **settings: Any) -> Any:
    set_seed(0)
    settings = {"hidden_size": 6, "num_hidden_layers": 2, **SMALL[family], **settings}
    if kind == "tokens":
        return FAMILIES[family].causal_lm(FAMILIES[family].config(vocab_size=VOCABULARY, **settings))
    return FAMILIES[family].regression(FAMILIES[family].config(**{"input_size": 2, "output_size": 3, **settings}))


def inputs_of(kind: str, time: int = 9, batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "tokens":
        return {"input_ids": torch.randint(VOCABULARY, (batch, time), generator=generator)}
    return {"input_values": torch.randn(batch, time, 2, generator=generator)}


# ---- what is computed


@EVERY
@BOTH
@pytest.mark.parametrize(("normalization", "skip_connections"), [("none", False), ("layer", True)])
@pytest.mark.parametrize("time", [1, 23])
def test_values_and_gradients(family: str, kind: str, normalization: str, skip_connections: bool, time: int) -> None:
    settings = {"normalization": normalization, "skip_connections": skip_connections, "use_bias": True}
    model = small(family, kind, **settings).double()
    inputs = {key: value.double() if kind == "regression" else value for key, value in inputs_of(kind, time).items()}
    found = model(**inputs).logits
    if kind == "regression":
        x = inputs["input_values"] @ model.input.weight.T + model.input.bias
        head = model.head
    else:
        x = F.one_hot(inputs["input_ids"], VOCABULARY).double() @ model.embed_tokens.weight
        head = model.lm_head
    expected = references.backbone(family, model, x) @ head.weight.T + head.bias
    assert found.shape == (3, time, VOCABULARY if kind == "tokens" else 3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 if family == "attention" else 1e-9)
    upstream, parameters = torch.randn_like(found), dict(model.named_parameters())
    ours, theirs = (
        torch.autograd.grad(logits, list(parameters.values()), upstream, materialize_grads=True, allow_unused=True)
        for logits in (found, expected)
    )
    tolerance = 1e-5 if family == "attention" else 1e-8  # positions are those of float32
    for name, mine, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, msg=name)


@EVERY
@BOTH
def test_no_output_looks_ahead(family: str, kind: str) -> None:
    model = small(family, kind).double().eval()
    key, values = next(iter(inputs_of(kind, 40).items()))
    values = values.double() if kind == "regression" else values
    changed = values.clone()
    changed[:, 25] = (changed[:, 25] + 1) % VOCABULARY
    with torch.no_grad():
        difference = (model(**{key: changed}).logits - model(**{key: values}).logits).abs().amax((0, 2))
    assert difference[:25].max() < 1e-12
    assert difference[25] > 1e-6


@pytest.mark.parametrize("length", [1, 2, 7, 100, 1000])
def test_the_kernel_of_a_state_space_model_is_its_impulse_response(length: int) -> None:
    mixer = small("state_space", "regression").double().backbone.blocks[0].mixer
    a = torch.complex(-mixer.log_decay.exp(), mixer.frequency) * mixer.log_step.exp()[:, None]
    factors = torch.view_as_complex(mixer.readout) * (a.exp() - 1) / (a / mixer.log_step.exp()[:, None])
    powers = a[..., None] * torch.arange(length)
    torch.testing.assert_close(mixer.kernel(length), 2 * (factors[..., None] * powers.exp()).sum(1).real)


@EVERY
@BOTH
def test_half_precision(family: str, kind: str) -> None:
    model, inputs = small(family, kind, normalization="layer", skip_connections=True), inputs_of(kind, 50)
    exact = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**inputs).logits
    half = model.bfloat16()(**inputs).logits
    assert half.dtype == torch.bfloat16
    for logits in (mixed, half):
        assert (logits.float() - exact).norm() < 0.1 * exact.norm()
    half.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_field_of_a_tcn_is_as_its_configuration_says() -> None:
    config = FAMILIES["tcn"].config(num_hidden_layers=3, kernel_size=3, hidden_act="linear")
    model = FAMILIES["tcn"].regression(config).double().eval()
    x = torch.zeros(1, 60, 1, dtype=torch.float64)
    x[0, 10] = 1.0
    with torch.no_grad():
        seen = (model(x).logits - model(torch.zeros_like(x)).logits)[0, :, 0].abs() > 1e-12
    assert seen.nonzero().flatten().tolist() == list(range(10, 10 + 1 + 2 * 2 * 7))


# ---- how parameters start


@EVERY
@BOTH
@pytest.mark.parametrize("use_bias", [True, False])
def test_every_parameter_is_started(family: str, kind: str, use_bias: bool) -> None:
    model = small(family, kind, normalization="layer", use_bias=use_bias)
    started = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for module in model.modules():
        module._is_hf_initialized = False
    set_seed(1)
    model.initialize_weights()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert use_bias or "bias" not in name or "norm" in name, name
        if parameter.numel() > 30:
            assert parameter.std().item() == pytest.approx(started[name].std().item(), rel=0.5, abs=0.01), name


@pytest.mark.parametrize("family", ["linear_rnn", "tanh_rnn"])
def test_recurrent_matrices_start_orthogonal(family: str) -> None:
    model = small(family, "regression", hidden_size=16, recurrent_scale=0.7)
    for name, parameter in model.named_parameters():
        if name.endswith("recurrent"):
            torch.testing.assert_close(parameter @ parameter.T, 0.49 * torch.eye(16), atol=1e-5, rtol=0)


def test_weight_norm_starts_as_a_plain_convolution() -> None:
    for causal in small("tcn", "regression").backbone.blocks[1].mixer.convolutions:
        norm, direction = causal.convolution.parametrizations.weight.parameters()
        torch.testing.assert_close(causal.convolution.weight, direction)
        assert direction.std().item() == pytest.approx((6 * 3) ** -0.5 / 3**0.5, rel=0.25)
        assert norm.shape == (6, 1, 1)


def test_a_state_space_model_starts_as_s4d_lin() -> None:
    mixer = small("state_space", "regression", hidden_size=64).backbone.blocks[0].mixer
    torch.testing.assert_close(mixer.log_decay.exp(), torch.full((64, 3), 0.5))
    torch.testing.assert_close(mixer.frequency[5], math.pi * torch.tensor([0.0, 1.0, 2.0]))
    assert 0.1 <= mixer.log_step.exp().min() < 0.15
    assert 0.35 < mixer.log_step.exp().max() <= 0.5


# ---- the loss


@EVERY
def test_the_loss_of_regression_is_the_squared_error_of_the_targets(family: str) -> None:
    model, inputs = small(family, "regression"), inputs_of("regression")
    labels = torch.randn(3, 9, 3)
    labels[0, :4], labels[2, 5, 1] = torch.nan, torch.nan
    output = model(**inputs, labels=labels)
    errors = (output.logits - labels).double().square().mean(-1)
    assert output.loss.item() == pytest.approx(errors[~errors.isnan()].mean().item(), rel=1e-6)
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_one_output_takes_labels_without_its_dimension_and_none_is_no_loss() -> None:
    model, inputs = small("tcn", "regression", output_size=1), inputs_of("regression")
    labels = torch.randn(3, 9)
    assert model(**inputs, labels=labels).loss == model(**inputs, labels=labels[..., None]).loss
    assert model(**inputs, labels=torch.full((3, 9), torch.nan)).loss == 0
    assert model(**inputs).loss is None


@EVERY
def test_the_loss_of_tokens_is_that_of_any_causal_model(family: str) -> None:
    model, inputs = small(family, "tokens"), inputs_of("tokens")
    labels = inputs["input_ids"].clone()
    labels[1, :5] = -100
    output = model(**inputs, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    targets = int((labels[:, 1:] != -100).sum())
    assert output.loss.item() == pytest.approx(expected.item() / targets, rel=1e-6)
    counted = model(**inputs, labels=labels, num_items_in_batch=2 * targets).loss
    assert counted.item() == pytest.approx(expected.item() / targets / 2, rel=1e-6)
    read = read_model_loss(model)
    assert read.shifts_labels
    assert read.counts_items
    assert not read.unsupported
    assert not isinstance(read.fused_head, str)


@EVERY
def test_padding_on_the_right_changes_nothing(family: str) -> None:
    model, ids = small(family, "tokens").eval(), inputs_of("tokens")["input_ids"]
    alone = model(input_ids=ids).logits
    padded = model(input_ids=F.pad(ids, (0, 4)), attention_mask=F.pad(torch.ones_like(ids), (0, 4))).logits
    torch.testing.assert_close(padded[:, :9], alone)


# ---- errors


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("linear_rnn", {"hidden_size": 0}, "hidden_size=0; accepted: a whole number of at least 1"),
        ("linear_rnn", {"vocab_size": 2.5}, "vocab_size=2.5; accepted: a whole number"),
        ("linear_rnn", {"num_hidden_layers": True}, "num_hidden_layers=True; accepted: a whole number"),
        ("linear_rnn", {"normalization": "batch"}, "normalization='batch'; accepted: 'none', 'layer'"),
        ("linear_rnn", {"skip_connections": 1}, "skip_connections=1; accepted: True, False"),
        ("linear_rnn", {"hidden_act": "tanh"}, "hidden_act='tanh'; accepted: 'linear', 'relu', 'gelu'"),
        ("linear_rnn", {"recurrent_scale": 0.0}, "recurrent_scale=0.0; accepted: a positive number"),
        ("tanh_rnn", {"recurrent_scale": math.nan}, "recurrent_scale=nan; accepted: a positive number"),
        ("tcn", {"kernel_size": -1}, "kernel_size=-1; accepted: a whole number"),
        ("tcn", {"hidden_act": None}, "hidden_act=None; accepted: 'linear'"),
        ("state_space", {"state_size": "4"}, "state_size='4'; accepted: a whole number"),
        ("state_space", {"smallest_step": 1.0}, "smallest_step=1.0; accepted: at most largest_step=0.1"),
        ("state_space", {"largest_step": math.inf}, "largest_step=inf; accepted: a positive number"),
        ("attention", {"num_attention_heads": 5}, "num_attention_heads=5; accepted: a divisor of hidden_size=32"),
        ("attention", {"intermediate_size": 0}, "intermediate_size=0; accepted: a whole number"),
    ],
)
def test_bad_settings_are_named(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILIES[family].config(**settings)


def test_bad_inputs_are_named() -> None:
    regression, tokens = small("linear_rnn", "regression"), small("linear_rnn", "tokens")
    with pytest.raises(ValueError, match=r"input_values have shape \(3, 9\); accepted: \[batch, time, 2\]"):
        regression(torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"labels have shape \(3, 9\); accepted: \(3, 9, 3\)"):
        regression(torch.zeros(3, 9, 2), labels=torch.zeros(3, 9))
    with pytest.raises(ValueError, match="vocab_size=None; accepted by a model for tokens"):
        FAMILIES["linear_rnn"].causal_lm(FAMILIES["linear_rnn"].config())
    ids = inputs_of("tokens")["input_ids"]
    with pytest.raises(ValueError, match="attention_mask has rows padded on the left; accepted: padding on the right"):
        tokens(input_ids=ids, attention_mask=torch.tensor([[0] + [1] * 8] + [[1] * 9] * 2))
    with pytest.raises(ValueError, match="position_ids is given: documents of a row are not kept apart"):
        tokens(input_ids=ids, position_ids=torch.arange(9)[None])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 9, 9\); accepted: \[batch, time\]"):
        tokens(input_ids=ids, attention_mask=torch.ones(3, 1, 9, 9))
