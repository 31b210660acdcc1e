"""Tiny models from configurations, adapters on them, and examples to train them on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    EncoderDecoderModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 97
PAD, START, END = 0, 1, 2
IGNORE = -100

Example = dict[str, list[int]]
Batch = dict[str, Tensor]

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
}
_T5_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}
_BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": PAD,
    "use_cache": False,
}


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=128,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            pad_token_id=PAD, bos_token_id=START, eos_token_id=END,
        )
    )  # fmt: skip


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_LLAMA_LIKE))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_LLAMA_LIKE, head_dim=8, tie_word_embeddings=True))


def _gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(
            **_LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, final_logit_softcapping=2.0,
            attn_logit_softcapping=None,
        )
    )  # fmt: skip


def _granite() -> PreTrainedModel:
    return GraniteForCausalLM(
        GraniteConfig(**_LLAMA_LIKE, logits_scaling=0.4, embedding_multiplier=3.0, residual_multiplier=0.7)
    )


def _cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**_LLAMA_LIKE, logit_scale=1.7))


def _mixtral() -> PreTrainedModel:
    settings = {**_LLAMA_LIKE, "experts_implementation": "eager"}  # the grouped product has no float64
    return MixtralForCausalLM(
        MixtralConfig(
            **settings, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
            router_aux_loss_coef=0.05,
        )
    )  # fmt: skip


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(**_T5_LIKE))


def _t5_gated() -> PreTrainedModel:
    """The 1.1 layout: gated, the decoder's output unscaled, the head a matrix of its own."""
    settings = {**_T5_LIKE, "tie_word_embeddings": False}
    model = T5ForConditionalGeneration(T5Config(**settings, feed_forward_proj="gated-gelu"))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, 16) / 4)
    return model


def _bart() -> PreTrainedModel:
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=128,
            dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
            pad_token_id=PAD, bos_token_id=START, eos_token_id=END, decoder_start_token_id=END,
            forced_eos_token_id=END,
        )
    )  # fmt: skip
    model.final_logits_bias.normal_()
    return model


def _mt5() -> PreTrainedModel:
    return MT5ForConditionalGeneration(MT5Config(**_T5_LIKE))


def _encoder_decoder() -> PreTrainedModel:
    model = EncoderDecoderModel(
        encoder=BertModel(BertConfig(**_BERT_LIKE), add_pooling_layer=False),
        decoder=BertLMHeadModel(BertConfig(**_BERT_LIKE, is_decoder=True, add_cross_attention=True)),
    )
    model.config.decoder_start_token_id = START
    model.config.pad_token_id = PAD
    model.config.eos_token_id = END
    model.config.vocab_size = VOCABULARY
    model.generation_config.decoder_start_token_id = START
    model.generation_config.pad_token_id = PAD
    nn.init.normal_(model.get_parameter("decoder.cls.predictions.bias"))
    return model


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "granite": _granite,
    "cohere": _cohere,
    "mixtral": _mixtral,
    "t5": _t5,
    "t5_gated": _t5_gated,
    "bart": _bart,
    "mt5": _mt5,
    "encoder_decoder": _encoder_decoder,
}
SEQ2SEQ = ("t5", "t5_gated", "bart", "mt5", "encoder_decoder")
CAUSAL = tuple(name for name in _BUILDERS if name not in SEQ2SEQ)
MODELS = CAUSAL + SEQ2SEQ

_ATTENTION = {
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "t5_gated": ["q", "v"],
    "mt5": ["q", "v"],
    "encoder_decoder": ["query", "value"],
}
_HEAD = {"encoder_decoder": "predictions.decoder"}
ADAPTERS = ("plain", "lora", "lora_head", "saved_head")


def head_name(name: str) -> str:
    """The last components of the head's module name."""
    return _HEAD.get(name, "lm_head")


def tiny_model(name: str, adapter: str = "plain", *, seed: int = 0, **config: Any) -> Any:
    """One of `MODELS`, float32, dropout 0, with logits of a few units, under one of `ADAPTERS`.

    `config` overrides entries of the finished model's configuration, and the model's copies of them.
    """
    torch.manual_seed(seed)
    model: Any = _BUILDERS[name]()
    for key, value in config.items():
        for owner in (model.config, model):
            if hasattr(owner, key):
                setattr(owner, key, value)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif "norm" not in key.lower():
                parameter.normal_(std=0.1)
        head = (model.get_submodule("decoder") if name == "encoder_decoder" else model).get_output_embeddings()
        for _ in range(3):  # where the head is tied, the embeddings change with it
            head.weight.mul_(2.0 / _output_of(head, model, name).std())
    return model if adapter == "plain" else _adapted(model, name, adapter)


def _output_of(head: nn.Module, model: PreTrainedModel, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    ids = torch.arange(3, VOCABULARY).view(1, -1)
    model(input_ids=ids, **({"decoder_input_ids": ids} if name in SEQ2SEQ else {}), use_cache=False)
    handle.remove()
    return seen[0]


def _adapted(model: PreTrainedModel, name: str, adapter: str) -> PeftModel:
    attention = _ATTENTION.get(name, ["q_proj", "v_proj"])
    head = head_name(name)
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if name in SEQ2SEQ else TaskType.CAUSAL_LM,
        r=4,
        lora_alpha=8,
        target_modules=[*attention, head] if adapter == "lora_head" else attention,
        modules_to_save=[head] if adapter == "saved_head" else None,
        fan_in_fan_out=name == "gpt2",
    )
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in peft_model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
            if adapter == "saved_head" and parameter.requires_grad and "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return peft_model


def trained_names(model: nn.Module) -> list[str]:
    """The parameters that training changes."""
    return [key for key, parameter in model.named_parameters() if parameter.requires_grad]


def examples(name: str, count: int = 8, *, seed: int = 0) -> list[Example]:
    """Unpadded examples of uneven lengths: prompts, a row without one, gaps among the targets, a single target."""
    return seq2seq_examples(count, seed=seed) if name in SEQ2SEQ else causal_examples(count, seed=seed)


def causal_examples(count: int = 8, *, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = 5 + (7 * i + 3 * seed) % 9
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        labels = list(ids)
        prompt = (0, 2, 3, 1)[i % 4]
        labels[:prompt] = [IGNORE] * prompt
        if i % 4 == 1:
            labels[4] = IGNORE  # a turn of the user's among the targets
        if i % 4 == 2:
            labels[:-1] = [IGNORE] * (length - 1)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def seq2seq_examples(count: int = 8, *, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        source = torch.randint(3, VOCABULARY, (4 + (5 * i + seed) % 6,), generator=generator).tolist()
        labels = torch.randint(3, VOCABULARY, ((1, 6, 4, 9)[(i + seed) % 4],), generator=generator).tolist()
        if i % 4 == 1 and len(labels) > 3:
            labels[2] = IGNORE
        rows.append({"input_ids": source, "labels": labels})
    return rows


@dataclass(frozen=True)
class PadCollator:
    """Pad examples to their longest, plus `extra` columns; `side` is that of the padding."""

    side: str = "right"
    extra: int = 0

    def __call__(self, rows: Sequence[Example]) -> Batch:
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in rows], PAD),
            "attention_mask": self._pad([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": self._pad([row["labels"] for row in rows], IGNORE),
        }
        if "loss_weights" in rows[0]:
            columns = [torch.tensor(row["loss_weights"]) for row in rows]
            width = batch["labels"].shape[1]
            batch["loss_weights"] = torch.stack([F.pad(c, self._sides(width - len(c))) for c in columns])
        return batch

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        width = max(map(len, rows)) + self.extra
        return torch.stack([F.pad(torch.tensor(row), self._sides(width - len(row)), value=value) for row in rows])

    def _sides(self, missing: int) -> tuple[int, int]:
        return (missing, 0) if self.side == "left" else (0, missing)


@dataclass(frozen=True)
class PackCollator:
    """Several documents per row, told apart by `position_ids` alone; rows are filled up with documents of one pad."""

    rows: int = 1

    def __call__(self, documents: Sequence[Example]) -> Batch:
        per_row = math.ceil(len(documents) / self.rows)
        columns: dict[str, list[list[int]]] = {}
        for start in range(0, len(documents), per_row):
            row = [{**d, "position_ids": list(range(len(d["labels"])))} for d in documents[start : start + per_row]]
            for key in ("input_ids", "labels", "position_ids"):
                columns.setdefault(key, []).append([value for document in row for value in document[key]])
        width = max(map(len, columns["input_ids"]))
        fill = {"input_ids": PAD, "labels": IGNORE, "position_ids": 0}
        return {
            key: torch.tensor([row + [fill[key]] * (width - len(row)) for row in rows])
            for key, rows in columns.items()
        }
