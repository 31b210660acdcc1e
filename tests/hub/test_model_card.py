"""The card says what was trained how, keeps what others wrote, and carries nothing of the machine."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_temporal
from hf_temporal.evaluation import PROFILE_NAME, save_profile
from hf_temporal.hub.model_card import (
    HEADING,
    TrainingRun,
    add_temporal_section,
    draw_loss_by_position,
    public_card,
    temporal_section,
)
from hf_temporal.training_args import TemporalTrainingArguments
from hf_temporal.weighting import TemporalWeighting

RUN = TrainingRun(
    weighting=TemporalWeighting(power=1.0),
    metrics={"eval_loss": (3.5, 2.25), "eval_rouge1": (12.04, 28.5), "eval_samples": 64},
    command="accelerate launch recipes/finetune_causal_lm.py --seed 7",
    task="summarization",
    dataset="docstrings",
    data="body → first paragraph.",
    data_hash="ab12" * 16,
    seed=7,
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    hardware="one abacus",
)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter_folder(base_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter with PEFT's card, which records the folder of the base model."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base_folder), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def card_text(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def add_twice(folder: Path, run: TrainingRun) -> str:
    add_temporal_section(folder, run)
    once = card_text(folder)
    add_temporal_section(folder, run)
    assert card_text(folder) == once
    assert once.count(HEADING) == 1
    return once


def test_section_says_everything() -> None:
    section = temporal_section(RUN)
    for part in (
        "| p | 1 |",
        "| schedule of p | constant |",
        "| origin | `target`",
        "| normalization | `sequence`",
        "| metric | before | after |",
        "| eval_loss | 3.500 | 2.250 |",
        "| eval_rouge1 | 12.040 | 28.500 |",
        "| eval_samples |  | 64 |",
        "```bash\naccelerate launch recipes/finetune_causal_lm.py --seed 7\n```",
        "body → first paragraph.",
        str(RUN.data_hash),
        "| seed | 7 |",
        "one abacus",
        f"torch {version('torch')}",
        f"transformers {transformers.__version__}",
        f"hf_temporal {hf_temporal.__version__}",
        "arXiv:2307.11462",
        "@software{hf_temporal",
    ):
        assert part in section
    for library in ("accelerate", "peft", "datasets"):
        assert f"{library} " in section


def test_infinite_power_is_written_inf() -> None:
    run = dataclasses.replace(RUN, weighting=TemporalWeighting(power=math.inf))
    assert "| p | inf |" in temporal_section(run)


def test_schedule_is_spelt_out() -> None:
    run = dataclasses.replace(RUN, schedule="linear", power_start=0.25, power_warmup_ratio=0.5)
    assert "| schedule of p | linear, from 0.25 over 50% of the steps |" in temporal_section(run)


def test_mixture_is_a_share() -> None:
    run = dataclasses.replace(RUN, weighting=TemporalWeighting(power=4.0, mixture=0.9))
    assert "| mixture | 90% of the weighted loss, the rest of the usual one |" in temporal_section(run)
    assert "mixture" not in temporal_section(RUN)


def test_effective_sample_size_is_a_share() -> None:
    run = dataclasses.replace(RUN, effective_sample_size=0.7512)
    assert "| effective sample size | 75.1% of the target tokens |" in temporal_section(run)
    assert "effective" not in temporal_section(RUN)


def test_own_weights_take_the_place_of_p() -> None:
    run = dataclasses.replace(RUN, weighting=TemporalWeighting(weight_fn=torch.minimum, origin="turn"))
    section = temporal_section(run)
    assert "minimum`" in section
    assert "| p |" not in section
    assert "`turn`" in section


def test_single_values_have_one_column() -> None:
    section = temporal_section(dataclasses.replace(RUN, metrics={"eval_loss": 0.00012}))
    assert "| metric | value |\n| --- | --- |\n| eval_loss | 0.00012 |" in section
    assert "before |" not in section


def test_optional_parts() -> None:
    plain = temporal_section(RUN)
    assert "![" not in plain
    assert "<details>" not in plain
    full = temporal_section(
        dataclasses.replace(
            RUN, picture="loss.png", data_versions={"b": "2", "a": "1"}, base_model_note="Once rounded to 4 bits."
        )
    )
    assert "](loss.png)" in full
    assert "a 1, b 2" in full
    assert "| base model | HuggingFaceTB/SmolLM2-135M-Instruct. Once rounded to 4 bits. |" in full


def test_card_is_made_where_there_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    text = add_twice(folder, RUN)
    assert "\n# my-model\n" in text
    card = ModelCard.load(folder / "README.md")
    assert card.data.tags == ["arxiv:2307.11462", "hf-temporal"]
    assert card.data.library_name == "transformers"
    assert card.data.base_model == RUN.base_model
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "loss": 2.25,
        "rouge1": 28.5,
        "samples": 64.0,
    }
    assert results["rouge1"].task_type == "summarization"
    assert results["rouge1"].dataset_name == "docstrings"


def test_peft_card_keeps_its_text_and_loses_the_local_base_model(adapter_folder: Path, base_folder: Path) -> None:
    before = card_text(adapter_folder)
    assert str(base_folder) in before
    text = add_twice(adapter_folder, RUN)
    assert str(base_folder) not in text
    assert base_folder.name not in text
    body = before.split("---\n", 2)[2]
    assert body.strip() in text
    data = ModelCard.load(adapter_folder / "README.md").data
    assert data.library_name == "peft"
    assert data.base_model == RUN.base_model
    assert data.tags is not None
    assert f"base_model:adapter:{RUN.base_model}" in data.tags
    assert {"hf-temporal", "arxiv:2307.11462", "lora"} <= set(data.tags)


def test_local_base_model_without_a_name_is_left_out(adapter_folder: Path, base_folder: Path) -> None:
    for base_model in (None, str(base_folder)):
        text = add_twice(adapter_folder, dataclasses.replace(RUN, base_model=base_model))
        assert str(base_folder) not in text
        assert (f"| base model | {base_folder.name}, a folder. |" in text) == (base_model is not None)
        data = ModelCard.load(adapter_folder / "README.md").data
        assert data.base_model is None
        assert not any(tag.startswith("base_model") for tag in data.tags or [])


def test_a_folder_named_relatively_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    card = public_card(
        "---\nbase_model: outputs/mine\ntags: ['base_model:adapter:outputs/mine']\n---\nof outputs/mine\n"
    )
    assert "outputs" not in card
    assert card.endswith("---\nof mine\n")
    add_temporal_section(tmp_path, dataclasses.replace(RUN, base_model="outputs/mine", dataset="outputs/mine"))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model is None
    assert data.datasets is None
    assert "| base model | mine, a folder. |" in card_text(tmp_path)


def test_metadata_hold_no_path_and_no_placeholder(tmp_path: Path) -> None:
    add_twice(tmp_path, dataclasses.replace(RUN, dataset="/srv/ann/train.json", license="mit"))
    data = ModelCard.load(tmp_path / "README.md").data
    assert {result.dataset_type for result in data.eval_results or []} == {"train.json"}
    assert data.datasets is None
    assert data.license == "mit"
    assert "| data | path/to/train.json: " in card_text(tmp_path)


def test_data_set_of_the_hub_is_named_in_the_metadata(tmp_path: Path) -> None:
    add_twice(tmp_path, dataclasses.replace(RUN, dataset="abisee/cnn_dailymail"))
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["abisee/cnn_dailymail"]


def test_trainer_card_keeps_its_text(base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2)
    args = TrainingArguments(str(folder), max_steps=1, eval_strategy="steps", eval_steps=1, use_cpu=True, seed=41)
    trainer = Trainer(LlamaForCausalLM.from_pretrained(base_folder), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.create_model_card(tags="mine", dataset="toy rows")
    before = card_text(folder)
    assert "seed: 41" in before
    text = add_twice(folder, RUN)
    assert before.split("---\n", 2)[2].strip() in text
    assert {"mine", "hf-temporal"} <= set(ModelCard.load(folder / "README.md").data.tags or [])


def test_results_on_other_data_stay(tmp_path: Path) -> None:
    other = dataclasses.replace(RUN, dataset="me/other", metrics={"eval_loss": 0.5})
    add_temporal_section(tmp_path, other)
    add_twice(tmp_path, RUN)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results or []
    assert {(result.dataset_type, result.metric_value) for result in results if result.metric_type == "loss"} == {
        ("me/other", 0.5),
        ("docstrings", 2.25),
    }


def test_a_later_run_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    add_temporal_section(tmp_path, RUN)
    later = dataclasses.replace(RUN, weighting=TemporalWeighting(power=2.0), metrics={"eval_loss": 1.125})
    text = add_twice(tmp_path, later)
    assert "| p | 2 |" in text
    assert "| p | 1 |" not in text
    data = ModelCard.load(tmp_path / "README.md").data
    assert [(result.metric_type, result.metric_value) for result in data.eval_results or []] == [("loss", 1.125)]


def test_what_stands_behind_the_section_stays(tmp_path: Path) -> None:
    add_temporal_section(tmp_path, RUN)
    with (tmp_path / "README.md").open("a", encoding="utf-8") as card:
        card.write("\n## Mine\n\nWords.\n")
    assert "## Mine\n\nWords.\n" in add_twice(tmp_path, RUN)


def test_values_that_are_not_finite_stay_out_of_the_model_index(tmp_path: Path) -> None:
    add_twice(tmp_path, dataclasses.replace(RUN, metrics={"eval_loss": (1.0, math.nan)}))
    assert not ModelCard.load(tmp_path / "README.md").data.eval_results


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("run --train_file /srv/people/ann/train.json --seed 1", "run --train_file path/to/train.json --seed 1"),
        ("run --output_dir=/srv/people/ann/out/", "run --output_dir=path/to/out"),
        ("run '/srv/ann/my file'", "run 'path/to/my file'"),
        ("run '--output_dir=/srv/Ann Onymous/out' --a='b'", "run '--output_dir=path/to/out' --a='b'"),
        ("run --output_dir=/srv/ann/out --a='b'", "run --output_dir=path/to/out --a='b'"),
        ("run ~/secret/place/x.yaml ~/y", "run path/to/x.yaml path/to/y"),
        (r"run C:\Users\ann\x.yaml", "run path/to/x.yaml"),
        (r"run \\server\people\x.yaml", "run path/to/x.yaml"),
        (r"run --source_prefix 'Summarize:\n\n'", r"run --source_prefix 'Summarize:\n\n'"),
        (r"run --source_prefix 'Q:\n\n'", r"run --source_prefix 'Q:\n\n'"),
        ("run file:///srv/people/x.yaml", "run path/to/x.yaml"),
        ("run --hub_token abc123 --seed 1", "run --hub_token <token> --seed 1"),
        ("HF_TOKEN=abc123 run", "HF_TOKEN=<token> run"),
        ("run --note hf_AbCdEfGhIjKlMnOpQrSt", "run --note <token>"),
        ("run --max_new_tokens 60 --tokenizer x", "run --max_new_tokens 60 --tokenizer x"),
        ("run recipes/configs/a.yaml 1/2 t/T", "run recipes/configs/a.yaml 1/2 t/T"),
        ("see https://arxiv.org/abs/2307.11462/x", "see https://arxiv.org/abs/2307.11462/x"),
    ],
)
def test_tokens_and_paths_stay_out(tmp_path: Path, command: str, shown: str) -> None:
    assert f"```bash\n{shown}\n```" in temporal_section(dataclasses.replace(RUN, command=command))
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n\n# x\n\n{command}\n", encoding="utf-8")
    text = add_twice(tmp_path, dataclasses.replace(RUN, command=command))
    assert f"# x\n\n{shown}\n" in text
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"


def test_home_stays_out_whatever_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/people/Ann Onymous"))
    run = dataclasses.replace(RUN, command='run "/people/Ann Onymous/x.json"', dataset="/people/Ann Onymous/d/t.csv")
    text = add_twice(tmp_path, run)
    assert "Ann" not in text
    assert 'run "path/to/x.json"' in text
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {result.dataset_type for result in results or []} == {"t.csv"}


def test_a_card_without_matplotlib_has_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bins = [{"from": 0.0, "to": 1.0, "loss": 1.0, "accuracy": None, "count": 1}]
    save_profile(tmp_path / PROFILE_NAME, split="eval", step=0, bins=bins)
    monkeypatch.delitem(sys.modules, "hf_temporal.plots", raising=False)
    for module in ("matplotlib", "matplotlib.axes", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(logging.getLogger("hf_temporal.hub.model_card"), "propagate", True)
    assert draw_loss_by_position(tmp_path) is None
    assert "pip install 'hf-temporal[plots]'" in caplog.text


def test_arguments_show_no_token() -> None:
    """As those of transformers; they stand in logs."""
    shown = repr(
        TemporalTrainingArguments("out", use_cpu=True, hub_token="hf_AbCdEfGhIjKlMnOpQrSt", temporal_power=0.75)
    )
    assert "AbCdEf" not in shown
    assert "temporal_power=0.75" in shown
