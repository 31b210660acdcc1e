"""The mixin in front of trainers that others wrote, run as they come.

Without weights (p = 0) each logs its own numbers; with p ≠ 0 each is refused at its first step at the latest, because
its loss is not the cross-entropy of a model on labels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_temporal import TemporalWeighting, TemporalWeightMixin
from tests.test_mixin import weighted
from tests.tiny_models import VOCABULARY, tiny_model

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

WORDS = {f"w{i}": i for i in range(VOCABULARY)}
TRL_KINDS = {
    "DPOTrainer": "trl",
    "KTOTrainer": "trl",
    "RewardTrainer": "trl",
    "GRPOTrainer": "trl",
    "RLOOTrainer": "trl",
    "DistillationTrainer": "trl",
    "GKDTrainer": "trl.experimental.gkd",
    "CPOTrainer": "trl.experimental.cpo",
    "ORPOTrainer": "trl.experimental.orpo",
}
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 0,
}


def tokenizer() -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", padding_side="left"
    )
    made.chat_template = (
        "{% for message in messages %}{{ 'w4 ' if message['role'] == 'user' else 'w5 ' }}"
        "{% generation %}{{ message['content'] }}{% endgeneration %} w2 {% endfor %}"
        "{% if add_generation_prompt %}w5 {% endif %}"
    )
    return made


def words(number: int, length: int) -> str:
    return " ".join(f"w{9 + (number * 7 + place * 3) % 80}" for place in range(length))


def rows(columns: str) -> Any:
    """Eight rows of these columns."""
    values: dict[str, Callable[[int], Any]] = {
        "prompt": lambda i: words(i, 3 + i % 3),
        "completion": lambda i: " " + words(i + 20, 3 + i % 4),
        "chosen": lambda i: " " + words(i + 20, 3 + i % 4),
        "rejected": lambda i: " " + words(i + 40, 3 + i % 3),
        "label": lambda i: i % 2 == 0,
        "messages": lambda i: [
            {"role": "user", "content": words(i, 3)},
            {"role": "assistant", "content": words(i + 20, 3 + i % 4)},
        ],
        "anchor": lambda i: words(i, 3 + i % 3),
        "positive": lambda i: words(i + 1, 4 + i % 2),
        "text": lambda i: words(i % 4, 4),
    }
    made = [{name: values[name](i) for name in columns.split()} for i in range(8)]
    return datasets.Dataset.from_list(made)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) + 0.1 * (sum(map(ord, text)) % 7) for text in completions]


def scorer() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,  # type: ignore[call-arg]
            pad_token_id=0,
        )
    )


COLUMNS = {
    "DPOTrainer": "prompt chosen rejected",
    "KTOTrainer": "prompt completion label",
    "RewardTrainer": "chosen rejected",
    "GRPOTrainer": "prompt",
    "RLOOTrainer": "prompt",
    "DistillationTrainer": "prompt",
    "GKDTrainer": "messages",
    "CPOTrainer": "prompt chosen rejected",
    "ORPOTrainer": "prompt chosen rejected",
}
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "GRPOTrainer": {"num_generations": 2, "max_completion_length": 6},
    "RLOOTrainer": {"num_generations": 2, "max_completion_length": 6, "beta": 0.0},
    "DistillationTrainer": {"max_completion_length": 6},
    "GKDTrainer": {"max_new_tokens": 6, "max_length": 32},
    "CPOTrainer": {"max_length": 32},
    "ORPOTrainer": {"max_length": 32},
}


def make_trl(name: str, folder: Path, weighting: TemporalWeighting | None) -> Any:
    trl = pytest.importorskip("trl", minversion="1.16.0")
    module: Any = pytest.importorskip(TRL_KINDS[name])
    assert trl is not None
    kind, config = getattr(module, name), getattr(module, name.replace("Trainer", "Config"))
    own: dict[str, Any] = {}
    if weighting is not None:
        kind, own["weighting"] = weighted(kind), weighting
    if name in ("GRPOTrainer", "RLOOTrainer"):
        own["reward_funcs"] = reward
    if name in ("DPOTrainer", "KTOTrainer"):
        own["ref_model"] = teacher()
    if name in ("DistillationTrainer", "GKDTrainer"):
        own["teacher_model"] = teacher()
    return kind(
        model=scorer() if name == "RewardTrainer" else tiny_model("llama"),
        args=config(str(folder), **{**SETTINGS, **OWN_SETTINGS.get(name, {})}),
        train_dataset=rows(COLUMNS[name]),
        eval_dataset=rows(COLUMNS[name]),
        processing_class=tokenizer(),
        **own,
    )


def teacher() -> Any:
    model: Any = tiny_model("llama")
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_sentence_transformers(_: str, folder: Path, weighting: TemporalWeighting | None) -> Any:
    package = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    kind: Any = package.SentenceTransformerTrainer
    own: dict[str, Any] = {}
    if weighting is not None:
        kind, own["weighting"] = weighted(kind), weighting
    model = encoder(folder)
    return kind(
        model=model,
        args=package.SentenceTransformerTrainingArguments(str(folder / "out"), **SETTINGS),
        train_dataset=rows("anchor positive"),
        eval_dataset=rows("anchor positive"),
        loss=losses.MultipleNegativesRankingLoss(model),
        **own,
    )


def encoder(folder: Path) -> Any:
    package = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    return package.SentenceTransformer(str(folder / "bert"), device="cpu")


def accuracy(predicted: Any, expected: Any) -> dict[str, float]:
    return {"accuracy": sum(map(bool, torch.as_tensor(predicted) == torch.as_tensor(expected))) / len(expected)}


class SetFit:
    """setfit's trainer, whose inner trainer of the embeddings has the mixin in front."""

    def __init__(self, folder: Path, weighting: TemporalWeighting | None) -> None:
        setfit = pytest.importorskip("setfit")
        model = setfit.SetFitModel(
            model_body=encoder(folder), model_head=pytest.importorskip("sklearn.linear_model").LogisticRegression()
        )
        args = setfit.TrainingArguments(
            str(folder / "out"), batch_size=4, max_steps=2, logging_steps=1, report_to="none", seed=0, use_amp=False
        )
        data = rows("text label").cast_column("label", datasets.Value("int64"))
        self.trainer = setfit.Trainer(model, args, train_dataset=data, eval_dataset=data, metric=accuracy)
        if weighting is not None:
            self.trainer.st_trainer = weighted(type(self.trainer.st_trainer))(
                setfit_model=model, setfit_args=args, callbacks=[], weighting=weighting
            )

    def train(self) -> None:
        self.trainer.train()

    def evaluate(self) -> Any:
        return self.trainer.evaluate()

    @property
    def state(self) -> Any:
        return self.trainer.st_trainer.state


def make_setfit(_: str, folder: Path, weighting: TemporalWeighting | None) -> Any:
    return SetFit(folder, weighting)


MAKERS: dict[str, Callable[[str, Path, TemporalWeighting | None], Any]] = {
    **dict.fromkeys(TRL_KINDS, make_trl),
    "SentenceTransformerTrainer": make_sentence_transformers,
    "setfit": make_setfit,
}


def run(name: str, folder: Path, power: float | None) -> list[dict[str, float]]:
    """What two steps and an evaluation after them report; without a power, of the trainer as it is."""
    torch.manual_seed(0)
    trainer = MAKERS[name](name, folder, None if power is None else TemporalWeighting(power))
    trainer.train()
    return [*trainer.state.log_history, trainer.evaluate()]


def values(reports: list[dict[str, float]]) -> list[dict[str, float]]:
    """All but times, and but what the mixin adds to an evaluation."""
    return [
        {key: value for key, value in report.items() if not any(word in key for word in NOT_ITS_OWN)}
        for report in reports
    ]


NOT_ITS_OWN = (
    "runtime", "second", "step_time",
    "eval_temporal_loss", "eval_first_token_loss", "eval_last_token_loss", "eval_head_loss", "eval_tail_loss",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", MAKERS)
def test_its_own_numbers_at_0(name: str, tmp_path: Path) -> None:
    stock, ours = (values(run(name, tmp_path / str(power), power)) for power in (None, 0.0))
    steps = [report for report in stock if "grad_norm" in report]
    assert len(steps) == 2
    assert all(report["grad_norm"] > 0 for report in steps)
    assert len(ours) == len(stock)
    for our, theirs in zip(ours, stock, strict=True):
        assert our == pytest.approx(theirs, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", MAKERS)
def test_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    kind = "BCSentenceTransformersTrainer" if name == "setfit" else name
    reasons = "with no labels|with batches of type list|does not come from the model's own"
    with pytest.raises(ValueError, match=rf"(Weighted{kind}.*({reasons})|({reasons}).*Weighted{kind}).*power=0"):
        run(name, tmp_path, 2.0)


def test_what_is_no_trainer_of_transformers() -> None:
    setfit = pytest.importorskip("setfit")

    class Weighted(TemporalWeightMixin, setfit.Trainer): ...  # type: ignore[name-defined]

    with pytest.raises(TypeError, match=r"setfit\.trainer\.Trainer\): no subclass of transformers\.Trainer"):
        Weighted(weighting=TemporalWeighting(2.0))
