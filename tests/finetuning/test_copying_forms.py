"""The forms of the copying task in the recipes: a run of each, lengths, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hf_temporal.data.copying import CopyingArguments
from hf_temporal.data.loading import DataArguments
from hf_temporal.finetuning.tasks import Copying
from recipes import finetune_causal_lm, finetune_seq2seq
from tests.finetuning.test_tasks import CHATS, QUICK, SMALL_LLAMA, SMALL_T5, evaluations
from tests.tiny_run import Tiny

LLAMA = ("--model_type", "llama", "--config_overrides", SMALL_LLAMA)
T5 = ("--model_type", "t5", "--config_overrides", SMALL_T5, "--predict_with_generate")
SYMBOLS = {
    "selective": ("--copy_length", "3", "--blank_length", "6"),
    "induction": ("--blank_length", "6"),
    "mqar": ("--blank_length", "12", "--num_queries", "5"),
}
ANSWERS = {"selective": 3, "induction": 1, "mqar": 5}


def copying(form: str) -> tuple[str, ...]:
    return "--task", "copying", "--copying_form", form


@pytest.mark.parametrize("form", SYMBOLS)
def test_symbols_are_learned_by_a_new_decoder_only_model_and_its_card_reads_them_off(
    form: str, tmp_path: Path
) -> None:
    flags = [*copying(form), *SYMBOLS[form], *LLAMA, *QUICK, "--output_dir", str(tmp_path)]
    finetune_causal_lm.main(flags)
    before, after = evaluations(tmp_path)
    assert after["metrics"]["eval_loss"] != before["metrics"]["eval_loss"]
    assert len(after["recall_by_position"]) == ANSWERS[form]
    assert after["metrics"]["eval_recall"] == pytest.approx(sum(after["recall_by_position"]) / ANSWERS[form])
    card = (tmp_path / "README.md").read_text("utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace(repr(tmp_path.name), repr(str(tmp_path)))
    printed: list[str] = []
    exec(code, {"print": printed.append})
    assert printed == [after["generated"][0]]


@pytest.mark.parametrize("form", ["selective", "induction"])
def test_symbols_are_learned_by_a_new_encoder_decoder(form: str, tmp_path: Path) -> None:
    finetune_seq2seq.main([*copying(form), *SYMBOLS[form], *T5, *QUICK, "--output_dir", str(tmp_path)])
    (*_, after) = evaluations(tmp_path)
    assert len(after["recall_by_position"]) == ANSWERS[form]
    assert len(after["references"][0].split()) == ANSWERS[form]


def test_needles_are_generated_by_a_pretrained_model(tiny: Tiny, tmp_path: Path) -> None:
    form = (*copying("needles"), "--copy_length", "2", "--blank_length", "40", "--num_needles", "2")
    finetune_causal_lm.main(tiny.flags(tmp_path, *form, "--text_column", "article", "--max_eval_samples", "5"))
    (*_, after) = evaluations(tmp_path)
    assert len(after["generated"]) == len(after["references"]) == 5
    assert len(after["recall_by_position"]) == 4
    assert {"eval_recall", "eval_exact_match", "eval_gen_len"} <= set(after["metrics"])


def test_chains_are_generated_by_a_pretrained_model_without_texts(tiny: Tiny, tmp_path: Path) -> None:
    form = (*copying("arithmetic"), "--num_steps", "2", "--max_eval_samples", "5", "--eval_length_factor", "2")
    finetune_causal_lm.main(
        [*form, "--model_name_or_path", str(tiny.model), *QUICK, "--output_dir", str(tmp_path / "run")]
    )
    (*_, after) = evaluations(tmp_path / "run")
    assert all(reference.count(";") == 3 for reference in after["references"])
    assert len(after["recall_by_position"]) == 2
    assert {"eval_recall", "eval_chain_accuracy"} <= set(after["metrics"])
    assert "trained to calculate: arithmetic in chains of 2 steps." in (tmp_path / "run" / "README.md").read_text()


# ---- lengths


def test_held_out_examples_are_longer_and_have_to_fit() -> None:
    arguments = CopyingArguments("mqar", blank_length=12, eval_length_factor=3)
    task = Copying(DataArguments(), arguments, text_column=None, seed=0)
    tokenizer = task.tokenizer(None)
    assert tokenizer is not None
    splits = task.encode(tokenizer, LlamaConfig(vocab_size=len(tokenizer)))
    assert {split: len(rows[0]["input_ids"]) for split, rows in splits.items()} == {
        "train": 8 + 12 + 1,
        "validation": 8 + 36 + 1,
        "test": 8 + 36 + 1,
    }
    with pytest.raises(ValueError, match=r"blank_length=36 and symbols=16 and .* make 45 tokens, .* has 44 positions"):
        task.encode(tokenizer, LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=44))


def test_a_trained_model_is_evaluated_at_another_length(tmp_path: Path) -> None:
    flags = [*copying("selective"), *SYMBOLS["selective"]]
    finetune_causal_lm.main([*flags, *LLAMA, *QUICK, "--output_dir", str(tmp_path / "trained")])
    trained = ("--model_name_or_path", str(tmp_path / "trained"), "--do_eval", "--max_eval_samples", "6")
    rest = ("--report_to", "none", "--use_cpu", "--output_dir")
    for factor in (1, 4):
        output_dir = tmp_path / f"at_{factor}"
        lengths = ("--eval_length_factor", str(factor))
        finetune_causal_lm.main([*flags, *lengths, *trained, *rest, str(output_dir)])
    assert evaluations(tmp_path / "at_1")[0]["references"] == evaluations(tmp_path / "trained")[1]["references"]
    recalls = [evaluations(tmp_path / name)[-1]["metrics"]["eval_recall"] for name in ("trained", "at_1")]
    assert recalls[0] == recalls[1]
    assert len(evaluations(tmp_path / "at_4")[0]["recall_by_position"]) == 3


# ---- what does not fit


def test_what_a_form_does_not_allow_is_named(tiny: Tiny, tmp_path: Path) -> None:
    run = (*QUICK, "--output_dir", str(tmp_path / "run"))
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS), encoding="utf-8")
    chats = ("--train_file", str(path), "--validation_file", str(path))
    with pytest.raises(ValueError, match="packing=True and copying_form='mqar': each row is read alone"):
        finetune_causal_lm.main([*copying("mqar"), *LLAMA, "--packing", *run])
    with pytest.raises(ValueError, match="copying_form='mqar' for an encoder–decoder"):
        finetune_seq2seq.main([*copying("mqar"), *SYMBOLS["mqar"], *T5, *run])
    with pytest.raises(ValueError, match="symbols=16 make 20 tokens, and the model has 36; accepted: a model of as"):
        finetune_causal_lm.main([*copying("mqar"), *LLAMA[:3], f"{SMALL_LLAMA},vocab_size=36", *run])
    with pytest.raises(ValueError, match="copying_form='needles' needs a column of texts"):
        finetune_causal_lm.main([*copying("needles"), "--model_name_or_path", str(tiny.model), *chats, *run])
