"""The recipes' tasks: copying, language modeling, what is left out, and tokenizing that is done once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
)

from hf_temporal.data.loading import DataArguments
from hf_temporal.data.summarization import SummarizationArguments
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS, SEQ2SEQ_ARGUMENTS, prepare_causal_lm, prepare_seq2seq
from hf_temporal.finetuning.tasks import Summarization
from hf_temporal.padding_free import ATTENTION
from recipes import finetune_causal_lm, finetune_seq2seq
from tests.tiny_run import Tiny
from tests.tiny_summarization import tiny_tokenizer

QUICK = (
    *("--do_train", "--do_eval", "--max_steps", "3", "--per_device_train_batch_size", "4", "--logging_steps", "1"),
    *(
        "--per_device_eval_batch_size",
        "4",
        "--max_eval_samples",
        "6",
        "--learning_rate",
        "1e-2",
        "--report_to",
        "none",
    ),
    *("--use_cpu", "--dataloader_pin_memory", "false", "--save_strategy", "no"),
)
DIGITS = ("--task", "copying", "--copy_length", "3", "--blank_length", "5")
SMALL_LLAMA = "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2"
SMALL_T5 = "d_model=16,d_kv=8,d_ff=32,num_layers=1,num_decoder_layers=1,num_heads=2"
CHATS = [
    {"messages": [{"role": "user", "content": f"Where is x{i}?"}, {"role": "assistant", "content": f"In file {i}."}]}
    for i in range(12)
]


def evaluations(output_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output_dir / "evaluations.json").read_text("utf-8"))["evaluations"]
    return found


# ---- copying


def test_digits_are_copied_by_a_new_decoder_only_model(tmp_path: Path) -> None:
    new = ("--model_type", "llama", "--config_overrides", SMALL_LLAMA)
    finetune_causal_lm.main([*DIGITS, *new, *QUICK, "--output_dir", str(tmp_path)])
    before, after = evaluations(tmp_path)
    assert after["metrics"]["eval_loss"] < before["metrics"]["eval_loss"]
    assert len(after["recall_by_position"]) == 3
    assert after["metrics"]["eval_recall"] == pytest.approx(sum(after["recall_by_position"]) / 3)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["eval_recall"] == after["metrics"]["eval_recall"]
    assert results["train_runtime"] > 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "(recall_by_position.png)" in card
    assert (tmp_path / "recall_by_position.png").is_file()
    code = card.split("```python\n")[1].split("```")[0].replace(repr(tmp_path.name), repr(str(tmp_path)))
    printed: list[str] = []
    exec(code, {"print": printed.append})
    assert printed == [after["generated"][0]]
    assert len(tokenizer) == model.config.vocab_size


def test_digits_are_copied_by_a_new_encoder_decoder(tmp_path: Path) -> None:
    new = ("--model_type", "t5", "--config_overrides", SMALL_T5, "--predict_with_generate")
    finetune_seq2seq.main([*DIGITS, *new, *QUICK, "--output_dir", str(tmp_path)])
    (*_, after) = evaluations(tmp_path)
    assert len(after["recall_by_position"]) == 3
    assert len(after["references"][0]) == 3


def test_a_passage_is_copied_by_a_pretrained_model(tiny: Tiny, tmp_path: Path) -> None:
    task = ("--task", "copying", "--copying_form", "text", "--text_column", "article")
    lengths = ("--copy_length", "6", "--blank_length", "9", "--max_eval_samples", "5")
    flags = tiny.flags(tmp_path, *task, *lengths)
    finetune_causal_lm.main(flags)
    (*_, after) = evaluations(tmp_path)
    assert len(after["generated"]) == 5
    assert len(after["recall_by_position"]) == 6
    assert {"eval_recall", "eval_exact_match", "eval_gen_len", "eval_empty"} <= set(after["metrics"])
    assert all(reference in "\n".join(_texts(tiny)) for reference in after["references"] if "�" not in reference)


def _texts(tiny: Tiny) -> list[str]:
    path = Path(tiny.data_flags[tiny.data_flags.index("--validation_file") + 1])
    return [json.loads(line)["article"] for line in path.read_text("utf-8").splitlines()]


def test_copying_needs_room_for_all_tokens(tmp_path: Path) -> None:
    new = ("--model_type", "llama", "--config_overrides", f"{SMALL_LLAMA},max_position_embeddings=11")
    with pytest.raises(ValueError, match=r"copy_length=3 and blank_length=5 make 12 tokens, .* has 11 positions"):
        finetune_causal_lm.main([*DIGITS, *new, *QUICK, "--output_dir", str(tmp_path)])


def test_digits_are_not_packed(tmp_path: Path) -> None:
    new = ("--model_type", "llama", "--packing")
    with pytest.raises(ValueError, match="packing=True and copying_form='digits'"):
        finetune_causal_lm.main([*DIGITS, *new, *QUICK, "--output_dir", str(tmp_path)])


# ---- language modeling


def test_chats_are_learned_packed_as_well_as_padded(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS), encoding="utf-8")
    files = ("--train_file", str(path), "--validation_file", str(path), "--task", "language_modeling")
    model = ("--model_name_or_path", str(tiny.model), "--temporal_power", "2")
    for how, flags in {"padded": ("--padding_free", "off"), "packed": ("--packing",)}.items():
        finetune_causal_lm.main([*files, *model, *QUICK, *flags, "--output_dir", str(tmp_path / how)])
    padded, packed = (load_file(tmp_path / how / "model.safetensors") for how in ("padded", "packed"))
    before = AutoModelForCausalLM.from_pretrained(tiny.model).state_dict()
    for name, weight in packed.items():
        torch.testing.assert_close(weight, padded[name], rtol=1e-3, atol=1e-4)
        assert not torch.equal(weight, before[name])
    first, last = evaluations(tmp_path / "packed")
    assert last["metrics"]["eval_loss"] < first["metrics"]["eval_loss"] - 0.1
    assert "generated" not in last


def test_packing_is_refused_for_a_model_that_crosses_documents(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS), encoding="utf-8")
    new = ("--model_type", "bloom", "--config_overrides", "hidden_size=16,n_layer=1,n_head=2", "--tokenizer_name")
    files = ("--train_file", str(path), "--validation_file", str(path), "--task", "language_modeling")
    with pytest.raises(ValueError, match="packing=True for a BloomForCausalLM, in which a packed document depends"):
        finetune_causal_lm.main(
            [*files, *new, str(tiny.model), "--packing", *QUICK, "--output_dir", str(tmp_path / "run")]
        )


BLOOM = ("--model_type", "bloom", "--config_overrides", "hidden_size=16,n_layer=1,n_head=2")
LLAMA = ("--model_type", "llama", "--config_overrides", SMALL_LLAMA)
PREFIX = "padding_free='auto': batches are padded, since "


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((*DIGITS, *LLAMA), "answers are read off the rows"),
        ((*DIGITS, *BLOOM), "answers are read off the rows"),
        ((*BLOOM, "--tokenizer_name"), "its attention does not come from transformers' AttentionInterface"),
        (("--model_name_or_path",), ""),
    ],
)
def test_batches_are_padded_where_they_have_to_be(
    flags: tuple[str, ...], problem: str, tiny: Tiny, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    data = () if "--task" in flags else (str(tiny.model), *tiny.data_flags)
    argv = [*flags, *data, *QUICK, "--output_dir", str(tmp_path)]
    run = prepare_causal_lm(parse(CAUSAL_ARGUMENTS, argv))
    assert [line.removeprefix(PREFIX) for line in said.messages if line.startswith(PREFIX)] == (
        [f"{problem}."] if problem else []
    )
    assert isinstance(run.data_collator, DataCollatorForSeq2Seq if problem else DataCollatorWithFlattening)
    model, _ = run.load()  # as a search for p makes it anew
    assert model.config._attn_implementation == run.model.config._attn_implementation
    assert (run.model.config._attn_implementation == ATTENTION) == (not problem)


def test_an_encoder_decoder_s_batches_are_padded(tiny: Tiny, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    t5 = ("--model_type", "t5", "--config_overrides", SMALL_T5, "--tokenizer_name", str(tiny.model))
    argv = [*t5, *tiny.data_flags, *QUICK, "--output_dir", str(tmp_path)]
    run = prepare_seq2seq(parse(SEQ2SEQ_ARGUMENTS, argv))
    assert isinstance(run.data_collator, DataCollatorForSeq2Seq)
    assert f"{PREFIX}an encoder-decoder has rows of two lengths." in said.messages
    with pytest.raises(ValueError, match="padding_free='on' for a T5ForConditionalGeneration"):
        prepare_seq2seq(parse(SEQ2SEQ_ARGUMENTS, [*argv, "--padding_free", "on"]))


def gptj_keeps_documents_apart() -> bool:
    """Whether those of this release of transformers are kept apart, as 5.0 does not."""
    torch.manual_seed(0)
    model = GPTJForCausalLM(GPTJConfig(vocab_size=9, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)).eval()
    tokens, positions = torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([[0, 1, 2, 0, 1]])
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits[:, 3:]
        return torch.allclose(packed, model(tokens[:, 3:]).logits, atol=1e-5)


def test_a_model_whose_attention_stays_is_packed_where_that_is_asked_for(
    tiny: Tiny, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    new = ("--model_type", "gptj", "--config_overrides", "n_embd=16,n_layer=1,n_head=2,rotary_dim=4,n_positions=64")
    argv = [*new, "--tokenizer_name", str(tiny.model), *tiny.data_flags, *QUICK, "--output_dir", str(tmp_path)]
    on = parse(CAUSAL_ARGUMENTS, [*argv, "--padding_free", "on"])
    if not gptj_keeps_documents_apart():
        with pytest.raises(ValueError, match="padding_free='on' for a GPTJForCausalLM, in which a packed document"):
            prepare_causal_lm(on)
        return
    asked = prepare_causal_lm(on)
    assert isinstance(asked.data_collator, DataCollatorWithFlattening)
    assert "padding_free='on': the model's own attention goes over each row as a whole, since" in said.text
    assert isinstance(prepare_causal_lm(parse(CAUSAL_ARGUMENTS, argv)).data_collator, DataCollatorForSeq2Seq)


def test_packing_and_padding_contradict_each_other(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packing=True and padding_free='off'"):
        parse(CAUSAL_ARGUMENTS, tiny.flags(tmp_path, "--packing", "--padding_free", "off"))


def test_plain_text_is_the_causal_recipe_s_alone(tiny: Tiny, tmp_path: Path) -> None:
    t5 = ("--model_type", "t5", "--config_overrides", SMALL_T5, "--tokenizer_name", str(tiny.model))
    text = ("--task", "language_modeling", "--text_column", "article", *tiny.data_flags)
    with pytest.raises(ValueError, match=r"task='language_modeling' is for finetune_causal_lm\.py"):
        finetune_seq2seq.main([*text, *t5, *QUICK, "--output_dir", str(tmp_path)])


# ---- splits


@pytest.mark.parametrize("more", [(), ("--do_predict",)])
def test_the_test_split_is_tokenized_where_it_is_needed(more: tuple[str, ...], tiny: Tiny, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path, *more)
    prepared = prepare_causal_lm(parse(CAUSAL_ARGUMENTS, flags))
    assert [*prepared.splits] == ["train", "validation", "test"][: 3 if more else 2]
    assert [*prepared.task.data.splits] == ["train", "validation", "test"]


# ---- what does not fit


def summarization(tiny: Tiny, **settings: Any) -> Summarization:
    names = [flag.removeprefix("--") for flag in tiny.data_flags[::2]]
    files: dict[str, Any] = dict(zip(names, tiny.data_flags[1::2], strict=True))
    return Summarization(DataArguments(**files), SummarizationArguments(**settings))


def test_rows_that_the_model_has_no_positions_for_are_left_out_and_counted(
    tiny: Tiny, said: pytest.LogCaptureFixture
) -> None:
    task, tokenizer = summarization(tiny), tiny_tokenizer()
    lengths = [len(row) for row in task.encode(tokenizer, LlamaConfig())["train"]["input_ids"]]
    limit = sorted(lengths)[9]
    kept = task.encode(tokenizer, LlamaConfig(max_position_embeddings=limit))["train"]
    short = [length for length in lengths if length <= limit]
    assert 10 <= len(short) < 24
    assert [len(row) for row in kept["input_ids"]] == short
    assert f"train: {24 - len(short)} of 24 rows have no target token or more tokens" in said.text
    with pytest.raises(ValueError, match="train: 24 of 24 rows have no target token or more tokens"):
        task.encode(tokenizer, LlamaConfig(max_position_embeddings=3))


@pytest.mark.parametrize("name", ["max_source_length", "max_target_length"])
def test_lengths_beyond_an_encoder_decoders_positions_are_named(tiny: Tiny, name: str) -> None:
    settings = {"max_source_length": 32, "max_target_length": 32} | {name: 33}
    with pytest.raises(ValueError, match=f"{name}=33, and the model has 32 positions"):
        summarization(tiny, **settings).encode(tiny_tokenizer(), BartConfig(max_position_embeddings=32))


def test_texts_are_tokenized_once(tiny: Tiny, child_environment: dict[str, str]) -> None:
    """In another process, with another seed of Python's hashes, nothing is tokenized again."""
    code = (
        "import sys; from transformers import AutoTokenizer, LlamaConfig, T5Config; "
        "from hf_temporal.finetuning import tasks; "
        "from hf_temporal.data.loading import DataArguments; "
        "from hf_temporal.data.summarization import SummarizationArguments; "
        "task = tasks.Summarization(DataArguments(train_file=sys.argv[1], validation_file=sys.argv[2]), "
        "SummarizationArguments(max_source_length=8)); tokenizer = AutoTokenizer.from_pretrained(sys.argv[3]); "
        "print([rows.cache_files for config in (LlamaConfig(), T5Config()) "
        "for rows in task.encode(tokenizer, config).values()])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, *tiny.data_flags[1:4:2], str(tiny.model)],
            env={**child_environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        for seed in ("1", "2")
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.count("cache-") >= 4
    assert "Tokenizing train" in runs[0].stderr
    assert "Tokenizing" not in runs[1].stderr
