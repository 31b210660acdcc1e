"""Short data sets of the copying problem, for tests."""

from __future__ import annotations

from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_temporal.data.copying import FORMS, CopyingArguments, DigitCopies, TextCopies, tokenize_texts
from hf_temporal.data.copying.examples import CopyingDataset
from hf_temporal.data.small_t5 import train_tokenizer
from tests.tiny_summarization import PAIRS, tiny_tokenizer

TEXTS = [f"{pair['article']} {pair['highlights']}" for pair in PAIRS]
SHORT = CopyingArguments(copy_length=3, blank_length=4)
PASSAGES = CopyingArguments(copying_form="text", copy_length=6, blank_length=30)


def digits(arguments: CopyingArguments = SHORT, **changes: Any) -> DigitCopies:
    settings: dict[str, Any] = {"split": "train", "size": 5, "seed": 7, "is_encoder_decoder": False}
    return DigitCopies(arguments, **settings | changes)


def passages(tokenizer: PreTrainedTokenizerBase, arguments: CopyingArguments = PASSAGES, **changes: Any) -> TextCopies:
    settings: dict[str, Any] = {"split": "train", "size": 20, "seed": 7, "is_encoder_decoder": False}
    texts = changes.pop("texts", TEXTS)
    tokens = tokenize_texts({"text": texts}, tokenizer)["tokens"] if texts else []
    return TextCopies(arguments, tokenizer, tokens, **settings | changes)


def drawn(
    arguments: CopyingArguments, tokenizer: PreTrainedTokenizerBase | None = None, **changes: Any
) -> tuple[CopyingDataset, PreTrainedTokenizerBase]:
    """A data set of any form, and the tokenizer of its tokens: the form's own, or the one that is given."""
    form = FORMS[arguments.copying_form]
    settings: dict[str, Any] = {"split": "train", "size": 50, "seed": 7, "is_encoder_decoder": False}
    tokenizer = form.tokenizer_of(arguments) or tokenizer or tiny_tokenizer()
    if form.generates:
        settings["tokenizer"] = tokenizer
    if form.from_texts:
        settings["texts"] = tokenize_texts({"text": TEXTS}, tokenizer)["tokens"]
    return form(arguments, **settings | changes), tokenizer


def seq2seq_tokenizer(template: str = "$A </s>") -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<pad>", 0), ("</s>", 1)]
    )
    return tokenizer
