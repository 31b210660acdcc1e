"""Models are loaded, made and adapted as their arguments say; contradictions are said before anything loads."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertLMHeadModel,
    BertModel,
    MT5ForConditionalGeneration,
    PreTrainedModel,
)

from hf_temporal.data.embedded_model import EMBEDDED_MODEL
from hf_temporal.finetuning import models
from hf_temporal.finetuning.models import (
    ModelArguments,
    Seq2SeqModelArguments,
    load_causal_lm,
    load_seq2seq_lm,
    load_tokenizer,
    require_4bit,
)
from tests import chinese
from tests.finetuning.tiny_checkpoints import TEXT, as_bert, pair_of, seq2seq_logits
from tests.tiny_models import tiny_model
from tests.tiny_summarization import tiny_tokenizer

# ---- arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"merge_adapter": True}, "merge_adapter=True is about an adapter, and use_peft=False"),
        ({"load_in_4bit": True}, "load_in_4bit=True is about an adapter, and use_peft=False"),
        ({"use_peft": True, "load_in_4bit": True, "merge_adapter": True}, "accepted: one of them"),
        ({"use_peft": True, "lora_r": 0}, "lora_r=0; accepted: a whole number of at least 1"),
        ({"use_peft": True, "lora_dropout": 1.0}, "lora_dropout=1.0; accepted: a number from 0 to below 1"),
        ({"use_peft": True, "lora_target_modules": []}, "lora_target_modules=[]; accepted: one name or more"),
        ({"config_overrides": "d_model=8"}, "config_overrides='d_model=8' is for a model_type"),
        ({"model_type": "t5", "model_name_or_path": "x/y"}, "model_name_or_path='x/y'; accepted: one of them"),
        ({"model_type": "t5", "use_peft": True}, "use_peft=True; accepted: one of them"),
        ({"model_type": "lama"}, "model_type='lama'"),
        ({"model_type": "llama", "config_overrides": "hiden_size=8"}, "hiden_size"),
        ({"model_type": "llama", "config_overrides": "hidden_size=wide"}, "config_overrides='hidden_size=wide'"),
        ({"model_type": "llama", "config_overrides": "hidden_size"}, "accepted: name=value,..."),
        ({"encoder_model_name_or_path": "a/b"}, "decoder_model_name_or_path=None; accepted: both or neither"),
        ({"decoder_model_name_or_path": "a/b"}, "encoder_model_name_or_path=None"),
    ],
)
def test_contradictions_are_said_before_anything_loads(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Seq2SeqModelArguments(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"model_name_or_path": "x/y"},
        {"model_type": "t5"},
        {"use_peft": True, "load_in_4bit": True},
        {"use_peft": True},
    ],
)
def test_a_pair_is_alone_and_an_adapter_on_it_is_merged(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"encoder_model_name_or_path.*accepted: "):
        pair_of(Path("a/b"), **given)


def test_overrides_have_the_types_of_the_configuration() -> None:
    given = "hidden_size=64, rms_norm_eps=1e-3,tie_word_embeddings=true,hidden_act=gelu"
    values = ModelArguments(model_type="llama", config_overrides=given).config_values()
    assert values == {"hidden_size": 64, "rms_norm_eps": 1e-3, "tie_word_embeddings": True, "hidden_act": "gelu"}


# ---- tokenizers


def test_a_tokenizer_that_read_no_vocabulary_is_refused(t5_pegasus: Path) -> None:
    """transformers makes T5's of it, in which every text is one unknown token."""
    silent = AutoTokenizer.from_pretrained(t5_pegasus)
    assert set(silent(TEXT, add_special_tokens=False).input_ids) - set(silent("▁").input_ids) == {silent.unk_token_id}
    with pytest.raises(ValueError, match=r"holds no vocabulary that T5Tokenizer reads; accepted: a tokenizer_type"):
        load_tokenizer(Seq2SeqModelArguments(model_name_or_path=str(t5_pegasus)))


def test_bert_reads_a_vocabulary_by_character_and_is_found_again(t5_pegasus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(as_bert(t5_pegasus))
    words = chinese.vocabulary()
    expected = [words.index(word) for word in ["[CLS]", *TEXT, "[SEP]"]]
    assert tokenizer(TEXT) == {"input_ids": expected, "attention_mask": [1] * len(expected)}
    tokenizer.save_pretrained(tmp_path)
    MT5ForConditionalGeneration.from_pretrained(t5_pegasus).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT) == tokenizer(TEXT)


def test_another_tokenizer_by_name(llama: Path, t5_pegasus: Path) -> None:
    arguments = ModelArguments(
        model_name_or_path=str(llama), tokenizer_name=str(t5_pegasus), tokenizer_type="bert", model_revision="v2"
    )
    assert load_tokenizer(arguments).get_vocab()["雨"] == chinese.vocabulary().index("雨")


def test_tokenizers_without_end_or_padding_are_refused(llama: Path, t5_pegasus: Path) -> None:
    arguments = ModelArguments(model_name_or_path=str(llama))
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    _, loaded = load_causal_lm(arguments, tokenizer)
    assert loaded.pad_token == loaded.eos_token == "<end>"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end token; accepted: one with eos_token"):
        load_causal_lm(arguments, tokenizer)
    with pytest.raises(ValueError, match="has no end token; accepted: one with eos_token or sep_token"):
        load_seq2seq_lm(as_bert(t5_pegasus), tokenizer)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no padding token; accepted: one with pad_token"):
        load_seq2seq_lm(as_bert(t5_pegasus), tokenizer)


# ---- decoder-only models


def test_the_embedded_model_is_recorded_by_its_name(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "embedded_model_folder", lambda: llama)
    model, tokenizer = load_causal_lm(ModelArguments(dtype="bfloat16"))
    assert model.name_or_path == model.config._name_or_path == EMBEDDED_MODEL
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size


def test_a_new_model_fits_its_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    overrides = "hidden_size=64,num_attention_heads=4,num_key_value_heads=2,num_hidden_layers=3,intermediate_size=96"
    model: Any
    model, given = load_causal_lm(ModelArguments(model_type="llama", config_overrides=overrides), tokenizer)
    assert given is tokenizer
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 64)
    assert len(model.get_submodule("model.layers")) == 3
    assert model.get_parameter("model.layers.0.self_attn.k_proj.weight").shape == (2 * 16, 64)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_new_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type='llama' has no tokenizer; accepted: with a tokenizer_name"):
        load_causal_lm(ModelArguments(model_type="llama"))


# ---- encoder–decoders


@pytest.mark.parametrize(
    ("kind", "overrides", "start"),
    [
        ("t5", "d_model=16,d_kv=8,d_ff=24,num_layers=2,num_heads=2", "pad"),
        (
            "bart",
            "d_model=16,encoder_layers=1,decoder_layers=2,encoder_attention_heads=2,decoder_attention_heads=2,"
            "encoder_ffn_dim=16,decoder_ffn_dim=16,max_position_embeddings=64",
            "eos",
        ),
    ],
)
def test_a_new_encoder_decoder_starts_and_ends_with_its_tokenizer(kind: str, overrides: str, start: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    arguments = Seq2SeqModelArguments(model_type=kind, config_overrides=overrides)
    model, _ = load_seq2seq_lm(arguments, tokenizer)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id}) == 2
    for owner in (model.config, model.generation_config):
        assert owner.eos_token_id == tokenizer.eos_token_id
        assert owner.pad_token_id == tokenizer.pad_token_id
        assert owner.decoder_start_token_id == getattr(tokenizer, f"{start}_token_id")
    assert getattr(model.generation_config, "forced_eos_token_id", None) in (None, tokenizer.eos_token_id)
    assert model.get_encoder().config.vocab_size == len(tokenizer)
    inputs = tokenizer(["Take x1"], return_tensors="pt")
    loss = model(**inputs, labels=inputs.input_ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.get_decoder().parameters())


def test_nothing_named_is_refused() -> None:
    with pytest.raises(ValueError, match="no model is named; accepted: model_name_or_path, model_type, encoder_model"):
        load_seq2seq_lm(Seq2SeqModelArguments())


def test_t5_pegasus_starts_and_ends_as_it_was_trained(t5_pegasus: Path, tmp_path: Path) -> None:
    words = chinese.vocabulary()
    before = json.loads((t5_pegasus / "config.json").read_text())
    assert (before["decoder_start_token_id"], before["eos_token_id"]) == (0, 1)
    model, tokenizer = load_seq2seq_lm(as_bert(t5_pegasus))
    written = torch.load(t5_pegasus / "pytorch_model.bin")
    assert torch.equal(model.get_output_embeddings().weight, written["lm_head.weight"])
    assert not torch.equal(written["lm_head.weight"], written["shared.weight"])

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for owner in (model.config, model.generation_config, again.config, again.generation_config):
        assert owner.decoder_start_token_id == words.index("[CLS]")
        assert owner.eos_token_id == words.index("[SEP]")
        assert owner.pad_token_id == words.index("[PAD]")
    assert torch.equal(seq2seq_logits(model, tokenizer), seq2seq_logits(again, read))

    with torch.no_grad():
        again.get_output_embeddings().weight[words.index("[SEP]")] = 0  # below the best of the others
    tokens = again.generate(**read([TEXT], return_tensors="pt"), max_new_tokens=4, do_sample=False)[0].tolist()
    assert tokens[0] == words.index("[CLS]")
    assert len(tokens) == 5
    with torch.no_grad():
        again.get_output_embeddings().weight[:] = 0
    monotone = again.generate(**read([TEXT], return_tensors="pt"), max_new_tokens=4, do_sample=False)[0].tolist()
    assert monotone == [words.index("[CLS]")] + [0] * 4  # the first of equals, and not the end
    assert str(read.decode(read(TEXT).input_ids, skip_special_tokens=True)).replace(" ", "") == TEXT


def test_an_adapter_cannot_say_how_t5_pegasus_ends(t5_pegasus: Path) -> None:
    settings = asdict(as_bert(t5_pegasus)) | {"use_peft": True}
    with pytest.raises(ValueError, match=r"does not know the \[CLS\] and \[SEP\].*accepted: merge_adapter=True"):
        load_seq2seq_lm(Seq2SeqModelArguments(**settings))
    model, tokenizer = load_seq2seq_lm(Seq2SeqModelArguments(**(settings | {"merge_adapter": True})))
    assert model.config.eos_token_id == tokenizer.sep_token_id


def test_a_model_made_for_its_bert_vocabulary_stays_as_it_is(t5_pegasus: Path, tmp_path: Path) -> None:
    """Chinese BART starts its decoder with [SEP]."""
    model, tokenizer = load_seq2seq_lm(as_bert(t5_pegasus))
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = tokenizer.sep_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_seq2seq_lm(Seq2SeqModelArguments(model_name_or_path=str(tmp_path)))
    assert again.config.decoder_start_token_id == again.generation_config.decoder_start_token_id
    assert again.config.decoder_start_token_id == tokenizer.sep_token_id


def test_a_longer_tokenizer_lengthens_the_embedding(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    arguments = Seq2SeqModelArguments(model_name_or_path=str(tmp_path))
    model: Any
    model, _ = load_seq2seq_lm(arguments, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(tokenizer) > 97
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match=r"has \d+ tokens and the embedding 97 rows.*under use_peft=True"):
        load_seq2seq_lm(Seq2SeqModelArguments(model_name_or_path=str(tmp_path), use_peft=True), tokenizer)


def test_an_untied_head_is_not_tied_by_lengthening(t5_pegasus: Path) -> None:
    tokenizer = load_tokenizer(as_bert(t5_pegasus))
    model, _ = load_seq2seq_lm(as_bert(t5_pegasus), tokenizer)
    rows = model.config.vocab_size
    tokenizer.add_tokens([f"<{index}>" for index in range(11)])
    assert len(tokenizer) > rows
    with pytest.raises(ValueError, match="cannot be lengthened in this model; accepted: the model's own tokenizer"):
        load_seq2seq_lm(as_bert(t5_pegasus), tokenizer)


# ---- warm-started pairs


def test_a_pair_keeps_both_models_and_is_found_again(bert: Path, tmp_path: Path) -> None:
    model, tokenizer = load_seq2seq_lm(pair_of(bert))
    whole = BertLMHeadModel.from_pretrained(bert).state_dict()
    for side, prefix in (("encoder", ""), ("decoder", "bert.")):
        part = model.get_submodule(side).state_dict()
        kept = [key for key in part if f"bert.{key.removeprefix('bert.')}" in whole and "crossattention" not in key]
        assert len(kept) > 20
        assert all(torch.equal(part[key], whole[f"bert.{key.removeprefix(prefix)}"]) for key in kept)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(seq2seq_logits(model, tokenizer), seq2seq_logits(again, read))
    for owner in (again.config, again.generation_config):
        assert owner.decoder_start_token_id == tokenizer.cls_token_id
        assert owner.eos_token_id == tokenizer.sep_token_id
        assert owner.pad_token_id == tokenizer.pad_token_id
    tokens = again.generate(**read([TEXT], return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert tokens[0, 0] == tokenizer.cls_token_id


def test_a_pair_has_one_vocabulary(bert: Path, llama: Path) -> None:
    with pytest.raises(ValueError, match=r"has another vocabulary than.*accepted: two models with one vocabulary"):
        load_seq2seq_lm(pair_of(bert, decoder_model_name_or_path=str(llama)))


def test_a_head_that_is_random_is_not_left_so_by_an_adapter(bert: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained(bert).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    model, _ = load_seq2seq_lm(pair_of(tmp_path))
    assert model.get_output_embeddings() is not None
    with pytest.raises(ValueError, match=r"has no weights for cls\.predictions.*which an adapter would leave random"):
        load_seq2seq_lm(pair_of(tmp_path, use_peft=True, merge_adapter=True))


# ---- four bits


def test_four_bits_need_a_package_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ModelArguments(use_peft=True, load_in_4bit=True)
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="load_in_4bit=True needs the package bitsandbytes: pip install"):
        require_4bit(arguments)
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="load_in_4bit=True needs a CUDA GPU"):
        require_4bit(arguments)
    require_4bit(ModelArguments(use_peft=True))


@pytest.mark.parametrize(("dtype", "compute"), [("float32", torch.bfloat16), ("float16", torch.float16)])
def test_four_bits_are_asked_of_the_library(
    llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, compute: torch.dtype
) -> None:
    asked: dict[str, Any] = {}
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: str, **given: Any) -> PreTrainedModel:
        asked.update(given)
        return load(name)

    monkeypatch.setattr(models, "require_4bit", lambda _: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    arguments = ModelArguments(model_name_or_path=str(llama), use_peft=True, load_in_4bit=True, dtype=dtype)
    model, _ = load_causal_lm(arguments)
    quantization = asked["quantization_config"]
    assert quantization.load_in_4bit
    assert quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant
    assert quantization.bnb_4bit_compute_dtype == compute
    assert asked["device_map"] == {"": 0}
    assert asked["dtype"] == dtype
    assert not any(parameter.requires_grad for parameter in model.parameters())  # until it has an adapter
