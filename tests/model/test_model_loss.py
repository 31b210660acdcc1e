"""What the probe finds out about a model, and that it leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    TrOCRConfig,
    TrOCRForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hf_temporal.model.model_loss import read_model_loss
from tests.tiny_models import VOCABULARY, tiny_model


def bart_decoder() -> Any:
    return BartForCausalLM(
        BartConfig(vocab_size=VOCABULARY, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    )


def trocr() -> Any:
    return TrOCRForCausalLM(
        TrOCRConfig(vocab_size=VOCABULARY, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    )


def xlnet() -> Any:
    return XLNetLMHeadModel(XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=16))


@pytest.mark.parametrize("model", [bart_decoder, trocr, xlnet])
def test_packed_rows_are_tried_out_where_labels_are_not_shifted(model: Any) -> None:
    torch.manual_seed(0)
    found = read_model_loss(model())
    assert not found.shifts_labels
    assert not found.keeps_documents_apart


class CountsFromElsewhere(LlamaForCausalLM):
    """Makes more of `position_ids` than the place of a token."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids**2
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    forward.__signature__ = __import__("inspect").signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def test_position_ids_that_do_not_undo_left_padding_are_not_given() -> None:
    model = tiny_model("llama")
    assert read_model_loss(model).needs_position_ids
    assert not read_model_loss(CountsFromElsewhere(model.config)).needs_position_ids


def test_what_a_first_forward_fixes_is_left_to_the_first_batch() -> None:
    model = NllbMoeForConditionalGeneration(
        NllbMoeConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=2, encoder_sparse_step=1,
            decoder_sparse_step=1, pad_token_id=0, decoder_start_token_id=1,
        )
    )  # fmt: skip
    router: Any = next(module for name, module in model.named_modules() if name.endswith("router"))
    before = router.expert_capacity
    assert read_model_loss(model).is_read
    assert router.expert_capacity == before
    assert all(module.training for module in model.modules())
