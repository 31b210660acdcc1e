"""Chinese summarization from beginning to end: the shipped configuration on a small T5-PEGASUS and our own pairs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_temporal.data.summarization import SummarizationArguments, encode_for_seq2seq_lm
from recipes.finetune_seq2seq import main
from tests import chinese
from tests.tiny_run import REPOSITORY

CONFIG = REPOSITORY / "recipes" / "configs" / "summarization" / "mt5_csl.yaml"
PLAIN_USE = """
import sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0].tolist()
assert not [name for name in sys.modules if name.split(".")[0] in ("hf_temporal", "peft", "recipes")]
print("|", tokens, "|", tokenizer.decode(tokens, skip_special_tokens=True))
"""


SHORT = ("--max_steps", "60", "--save_steps", "60", "--learning_rate", "1e-2", "--max_train_samples", "8")


def flags(folder: Path, *more: str) -> list[str]:
    """The shipped configuration with another model, other data and fewer steps, on the CPU."""
    return [
        *("--config", str(CONFIG)),
        *("--model_name_or_path", str(folder / "t5_pegasus"), "--dataset_name", str(folder / "csl")),
        *("--output_dir", str(folder / "run"), "--max_target_length", "32", "--bf16", "false", "--use_cpu"),
        *("--warmup_steps", "0", "--save_strategy", "steps", "--eval_strategy", "no", "--report_to", "none"),
        *("--dataloader_pin_memory", "false", "--logging_steps", "5"),
        *more,
    ]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "evaluations.json").read_text("utf-8"))["evaluations"]
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint in `t5_pegasus` and the pairs in `csl`, eight to learn by heart in `test` again."""
    folder = tmp_path_factory.mktemp("chinese")
    chinese.write_checkpoint(folder / "t5_pegasus")
    (folder / "csl").mkdir()
    files = chinese.write_pairs(folder / "csl")
    seen = files["train"].read_text("utf-8").splitlines(keepends=True)[:8]
    (folder / "csl" / "test.jsonl").write_text("".join(seen), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(small: Path) -> Path:
    """The output of a run that sees eight pairs often; it is evaluated on others."""
    main(flags(small, *SHORT, "--do_predict"))
    return small / "run"


def test_labels_start_behind_the_start_of_the_decoder(small: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small / "t5_pegasus", tokenizer_type="bert")
    words = chinese.vocabulary()
    batch = {"text": [chinese.PAIRS[0]["abstract"]], "summary": [chinese.PAIRS[0]["title"]]}
    arguments = SummarizationArguments(max_source_length=512, max_target_length=32)
    encoded = encode_for_seq2seq_lm(batch, tokenizer, arguments, tokenizer.cls_token_id)
    characters = [*chinese.PAIRS[0]["title"], "[SEP]"]
    assert encoded["labels"] == [[words.index(character) for character in characters]]
    assert encoded["input_ids"][0][0] == tokenizer.cls_token_id


def test_it_learns_the_titles_and_scores_characters(trained: Path) -> None:
    before, after = evaluations(trained)
    assert (before["step"], after["step"]) == (0, 60)
    assert [text.replace(" ", "") for text in after["references"]] == [pair["title"] for pair in chinese.PAIRS[32:]]
    assert after["metrics"]["eval_rouge1"] > before["metrics"]["eval_rouge1"] > 0  # words would score nothing
    assert before["metrics"]["eval_gen_len"] == 32
    assert 5 < after["metrics"]["eval_gen_len"] < 32  # it has learned to end
    predictions = [json.loads(line) for line in (trained / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(predictions) == 8
    assert sum(each["generated"] == each["reference"] for each in predictions) >= 4


def test_what_is_saved_needs_nothing_of_ours(trained: Path, child_environment: dict[str, str]) -> None:
    words = chinese.vocabulary()
    pair = chinese.PAIRS[0]
    run = subprocess.run(
        [sys.executable, "-c", PLAIN_USE, str(trained), pair["abstract"]],
        env=child_environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    _, tokens, text = run.stdout.split("|")
    ids = json.loads(tokens)
    assert ids[0] == words.index("[CLS]")
    assert words.index("[CLS]") not in ids[1:]
    assert ids[-1] == words.index("[SEP]")
    assert len(set(text.replace(" ", "").strip()) & set(pair["title"])) > len(set(pair["title"])) / 2  # it was seen


def test_the_head_stays_a_matrix_of_its_own(trained: Path) -> None:
    for folder in (trained, trained / "checkpoint-60"):
        weights = load_file(folder / "model.safetensors")
        assert not torch.equal(weights["lm_head.weight"], weights["shared.weight"])


def test_the_finished_run_is_found_again(small: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tying the weights while they are read back would put the embedding in the head's place."""
    weights = load_file(trained / "model.safetensors")
    monkeypatch.setattr("recipes.finetune_seq2seq.Seq2SeqTrainer.training_step", lambda *_: pytest.fail("trained"))
    main(flags(small, *SHORT))
    again = load_file(trained / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_the_default_tokenizer_scores_chinese_by_the_character(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that has learned nothing shares a character or two with the titles; words would score 0."""
    monkeypatch.setattr("hf_temporal.finetuning.run.report", lambda *_: "")
    scores = []
    for name in ("default", "char"):
        folder = tmp_path / name
        main(flags(small, "--output_dir", str(folder), "--rouge_tokenizer", name, "--do_train", "false"))
        metrics = evaluations(folder)[-1]["metrics"]
        scores.append({key: value for key, value in metrics.items() if key.startswith("eval_rouge")})
    assert scores[0] == scores[1]
    assert scores[0]["eval_rouge1"] > 0


def test_a_merged_adapter_is_the_whole_model(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = flags(
        small, "--use_peft", "--merge_adapter", "--max_steps", "4", "--save_steps", "2", "--do_eval", "false"
    )
    given += ["--output_dir", str(tmp_path / "run"), "--learning_rate", "1e-2"]
    main(given)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.startswith("adapter_")]
    assert (tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors").exists()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    before = torch.load(small / "t5_pegasus" / "pytorch_model.bin")
    changed = {name for name in before if name in weights and not torch.equal(weights[name], before[name])}
    assert len(changed) > 20
    assert not {"shared.weight", "lm_head.weight"} & changed
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert model.generation_config.decoder_start_token_id == chinese.vocabulary().index("[CLS]")

    (tmp_path / "run" / "model.safetensors").unlink()
    monkeypatch.setattr("recipes.finetune_seq2seq.Seq2SeqTrainer.training_step", lambda *_: pytest.fail("trained"))
    main(given)
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
