"""Models of every family are saved, loaded, trained and evaluated as any other model."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer
from hf_temporal.data.copying import CopyingArguments, DigitCopies, digit_tokenizer
from tests.memory.test_models import BOTH, EVERY, KINDS, inputs_of, small


def auto_class(kind: str) -> Any:
    return AutoModelForCausalLM if kind == "tokens" else AutoModel


@EVERY
@BOTH
def test_saved_models_load_through_the_auto_classes(
    family: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = small(family, kind).eval(), inputs_of(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path)
            loaded = auto_class(kind).from_pretrained(tmp_path)
            config = AutoConfig.from_pretrained(tmp_path)
    finally:
        logging.disable_propagation()
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []
    assert type(loaded) is type(model)
    assert type(config) is type(model.config)
    assert {**config.to_dict(), "architectures": None} == {**model.config.to_dict(), "architectures": None} | {
        key: config.to_dict()[key] for key in ("dtype", "_name_or_path", "auto_map") if key in config.to_dict()
    }
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


CHILD = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_temporal", "recipes", "tests"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nowhere())
try:
    import hf_temporal
except ModuleNotFoundError:
    pass
else:
    sys.exit("hf_temporal can be imported")

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

for folder, loader in zip(sys.argv[1:], (AutoModel, AutoModelForCausalLM)):
    model = loader.from_pretrained(folder, trust_remote_code=True)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == model.config.model_type
    inputs = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder + "/logits.pt")
    model.save_pretrained(folder + "/again")
assert not any(name.split(".")[0] == "hf_temporal" for name in sys.modules)
"""


def test_saved_models_load_where_the_package_is_not(tmp_path: Path) -> None:
    models = {"values": small("tcn", "regression").eval(), "tokens": small("linear_rnn", "tokens").eval()}
    for (name, model), kind in zip(models.items(), KINDS, strict=True):
        model.save_pretrained(tmp_path / name)
        torch.save(inputs_of(kind), tmp_path / name / "inputs.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", CHILD, *(str(tmp_path / name) for name in models)],
        cwd=tmp_path, check=True, timeout=120,
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    for (name, model), kind in zip(models.items(), KINDS, strict=True):
        with torch.no_grad():
            logits = model(**inputs_of(kind)).logits
            assert torch.equal(torch.load(tmp_path / name / "logits.pt"), logits)
            assert torch.equal(
                auto_class(kind).from_pretrained(tmp_path / name / "again")(**inputs_of(kind)).logits, logits
            )
        assert (tmp_path / name / "again" / "modeling.py").exists()


def rows_of(kind: str, count: int = 16) -> Any:
    if kind == "tokens":
        arguments = CopyingArguments(copy_length=2, blank_length=3)
        return DigitCopies(arguments, split="train", size=count, seed=0, is_encoder_decoder=False)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        x = torch.randn(8, 2, generator=generator)
        rows.append({"input_values": x, "labels": x.cumsum(0) @ torch.ones(2, 3)})
    return rows


def logs_of(
    trainer_class: type[Trainer], model: Any, kind: str, folder: Path, *, power: float, steps: int, **more: Any
) -> list[dict[str, float]]:
    settings: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 16, "learning_rate": 0.01, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, **more,
    }  # fmt: skip
    arguments: TrainingArguments
    if trainer_class is Trainer:
        arguments = TrainingArguments(str(folder), **settings)
    else:
        arguments = TemporalTrainingArguments(str(folder), temporal_power=power, **settings)
    collator = DataCollatorForSeq2Seq(digit_tokenizer()) if kind == "tokens" else None
    trainer = trainer_class(model, arguments, train_dataset=rows_of(kind), data_collator=collator)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@EVERY
@BOTH
def test_training_at_p_2(family: str, kind: str, tmp_path: Path) -> None:
    model = small(family, kind, normalization="layer", skip_connections=True)
    logs = logs_of(TemporalWeightTrainer, model, kind, tmp_path, power=2.0, steps=10, learning_rate=0.03)
    assert len(logs) == 10
    assert logs[-1]["loss"] < 0.9 * logs[0]["loss"]
    assert logs[0]["temporal_power"] == 2.0
    assert logs[0]["effective_sample_size"] < 0.9


@EVERY
@BOTH
def test_p_0_is_the_stock_trainer(family: str, kind: str, tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    ours, stock = (
        logs_of(trainer_class, small(family, kind), kind, tmp_path, power=0.0, steps=2, **more)
        for trainer_class in (TemporalWeightTrainer, Trainer)
    )
    for mine, other in zip(ours, stock, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@BOTH
def test_evaluation(kind: str, tmp_path: Path) -> None:
    arguments = TemporalTrainingArguments(str(tmp_path), temporal_power=1.0, report_to="none", use_cpu=True)
    collator = DataCollatorForSeq2Seq(digit_tokenizer()) if kind == "tokens" else None
    trainer = TemporalWeightTrainer(
        small("tanh_rnn", kind), arguments, eval_dataset=rows_of(kind), data_collator=collator
    )
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_temporal_loss", "eval_tail_loss"} <= metrics.keys()
    assert (tmp_path / "loss_by_position.json").exists()
