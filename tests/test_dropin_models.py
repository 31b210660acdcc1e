"""Other models, other inputs and outputs, encoder-decoders that generate: at p = 0 what stock does with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from tests.stock_and_ours import Behaviour, Maker, assert_stock
from tests.test_dropin import data, tokenizer
from tests.tiny_models import IGNORE, VOCABULARY, causal_examples, tiny_model


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


def nested(returns: str) -> Behaviour:
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


def other_model(name: str, **arguments: Any) -> Behaviour:
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


def summaries(prediction: Any) -> dict[str, float]:
    tokens = np.clip(prediction.predictions, 0, None)
    found = {"sum": float(tokens.sum()), "width": float(tokens.shape[1]), "labels": float(prediction.label_ids.sum())}
    return found if getattr(prediction, "inputs", None) is None else {**found, "in": float(prediction.inputs.sum())}


def generation(name: str, **arguments: Any) -> Behaviour:
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


BEHAVIOURS: dict[str, Behaviour] = {
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
    "seq2seq: generation": generation("t5", generation_max_length=6),
    "seq2seq: beams": generation("bart", generation_num_beams=2, generation_max_length=7),
    "seq2seq: generation config": generation(
        "mt5", generation_config=GenerationConfig(max_new_tokens=3, decoder_start_token_id=0, pad_token_id=0)
    ),
    "seq2seq: best model, early stopping": seq2seq_best,
    "seq2seq: adapters": seq2seq_adapters,
}  # fmt: skip


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_behaviour_is_the_stock_one(name: str, tmp_path: Path) -> None:
    assert_stock(BEHAVIOURS[name], tmp_path)
