"""The command hf-temporal: which flags go where, which recipe a model needs, names that are mistyped."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.commands.launch import launch_command_parser
from transformers import BartConfig, LlamaConfig

from hf_temporal import cli
from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS, SEQ2SEQ_ARGUMENTS
from hf_temporal.installed import config_path, engine_path, recipes

RECIPES = Path(__file__).parents[1] / "recipes"
OWN = {each.name for kind in (*CAUSAL_ARGUMENTS, *SEQ2SEQ_ARGUMENTS) for each in fields(kind)}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The recipes that are launched, and their flags; none is run."""
    calls: list[tuple[str, list[str]]] = []

    def launch(command: str, flags: list[str], program: str) -> int:
        assert program == "hf-temporal suggest"
        calls.append((command, [*flags]))
        return 0

    monkeypatch.setattr(cli, "_launch", launch)
    return calls


def test_options_that_both_have_are_the_recipes() -> None:
    options = {
        option[2:].replace("-", "_")
        for action in launch_command_parser()._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert options & OWN <= {*cli.NOT_OF_THE_LAUNCHER}
    assert {*cli.NOT_OF_THE_LAUNCHER} <= options


def test_options_of_accelerate_are_told_from_the_recipes() -> None:
    flags = [
        *("--num_processes", "2", "--output_dir", "out", "--mixed-precision=bf16", "--multi_gpu", "--do_train"),
        *("--debug", "underflow_overflow", "--accelerate_config", "ddp_cpu", "--source_prefix", "a b: "),
        *("--gradient_accumulation_steps", "2"),
    ]
    of_launcher, of_recipe = cli.split_flags(flags, launch_command_parser())
    engine = str(RECIPES / "accelerate" / "ddp_cpu.yaml")
    assert of_launcher == ["--num_processes", "2", "--mixed-precision=bf16", "--multi_gpu", "--config_file", engine]
    assert of_recipe == [
        *("--output_dir", "out", "--do_train", "--debug", "underflow_overflow", "--source_prefix", "a b: "),
        *("--gradient_accumulation_steps", "2"),
    ]


def test_shipped_configurations_are_found_by_name(tmp_path: Path) -> None:
    assert recipes() == RECIPES
    assert config_path("copying/small_llama") == RECIPES / "configs" / "copying" / "small_llama.yaml"
    for path in (RECIPES / "accelerate").glob("*.yaml"):
        assert engine_path(path.stem) == path
        assert path.stem in cli.HELP
    own = tmp_path / "mine"
    own.touch()
    assert config_path(str(own)) == own
    with pytest.raises(ValueError, match=r"'smollm2' is neither a file nor .*; the nearest is 'copying/smollm2_lora'"):
        config_path("smollm2")
    with pytest.raises(
        ValueError, match=r"looked at .*/away\.yaml; accepted: a YAML file, or .*copying/small_attention, "
    ):
        config_path("away.yaml")
    with pytest.raises(ValueError, match=r"accelerate_config='fsdp' is neither .*; the nearest is 'fsdp2'"):
        engine_path("fsdp")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetune-casual-lm"], "'finetune-casual-lm' is no command; .* the nearest is 'finetune-causal-lm'"),
        (["suggest", "finetune-seq2sek"], "the nearest is 'finetune-seq2seq'"),
        (["suggest", "--config", "copying/small_lama"], "the nearest is 'copying/small_llama'"),
        (["finetune-causal-lm", "--accelerate_config=cpus"], "the nearest is 'cpu'"),
        (["finetune-causal-lm", "--num_processes", "two"], "argument --num_processes.*: invalid int value: 'two'"),
        (["finetune-causal-lm", "--multi_gpu", "--num_processes", "1"], "You need to use at least 2 processes"),
    ],
)
def test_names_that_are_mistyped(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    written = capsys.readouterr().err
    assert written.startswith("hf-temporal: ")
    assert len(written.splitlines()) == 1
    assert re.search(message, written)


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ([], "finetune-causal-lm"),
        (["--model_name_or_path", "{llama}"], "finetune-causal-lm"),
        (["--model-name-or-path={bart}"], "finetune-seq2seq"),
        (["--config", "{yaml}"], "finetune-seq2seq"),
        (["--config", "{yaml}", "--model_name_or_path", "{llama}"], "finetune-causal-lm"),
        (["--model_type", "t5"], "finetune-seq2seq"),
        (["--model_type", "memory_tcn", "--task", "copying"], "finetune-causal-lm"),
        (["--model_name_or_path", "nowhere"], "finetune-causal-lm"),
        (["--encoder_model_name_or_path", "a", "--decoder_model_name_or_path", "b"], "finetune-seq2seq"),
        (["--config", "copying/small_t5"], "finetune-seq2seq"),
        (["--config", "summarization/t5_small_docstrings"], "finetune-seq2seq"),
    ],
)
def test_suggest_finds_the_recipe_of_a_model(
    flags: list[str], command: str, launched: list[tuple[str, list[str]]], tmp_path: Path
) -> None:
    LlamaConfig().save_pretrained(tmp_path / "llama")
    BartConfig().save_pretrained(tmp_path / "bart")
    (tmp_path / "c.yaml").write_text(f"model_name_or_path: {tmp_path / 'bart'}\n")
    places = {"llama": tmp_path / "llama", "bart": tmp_path / "bart", "yaml": tmp_path / "c.yaml"}
    given = [flag.format(**places) for flag in flags]
    assert cli.main(["suggest", *given]) == 0
    assert cli.main(["suggest", "finetune-seq2seq", *given]) == 0
    assert launched == [(command, [*given, "--suggest_power"]), ("finetune-seq2seq", [*given, "--suggest_power"])]


def test_compare_is_given_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[list[str]] = []
    module = ModuleType("hf_temporal.compare.main")

    def compare(argv: list[str], *, program: str) -> int:
        assert program == "hf-temporal compare"
        given.append(argv)
        return 3

    module.main = compare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hf_temporal.compare.main", module)
    monkeypatch.chdir(RECIPES.parent)
    own = tmp_path / "recipe.py"
    own.touch()
    assert cli.main(["compare", "finetune-causal-lm", "--config", "copying/small_llama", "--powers", "0"]) == 3
    assert cli.main(["compare", str(own), "--config=copying/small_t5"]) == 3
    assert cli.main(["compare", "--grid", "own.yaml", "--accelerate_config", "ddp_cpu"]) == 3
    assert given == [
        ["recipes/finetune_causal_lm.py", "--config", "recipes/configs/copying/small_llama.yaml", "--powers", "0"],
        [str(own), "--config=recipes/configs/copying/small_t5.yaml"],
        ["--grid", "own.yaml", "--accelerate_config", "recipes/accelerate/ddp_cpu.yaml"],
    ]
    assert cli.main(["compare", "finetune-causal"]) == 2


@pytest.mark.parametrize("command", cli.RECIPES)
def test_help_is_the_recipes(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-temporal"])
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    written = capsys.readouterr().out
    assert written.startswith(f"usage: hf-temporal {command} [--config FILE.yaml]")
    own, of_the_trainer = written.split("\narguments of transformers' TrainingArguments:\n")
    for flag in ("--config", "--model_name_or_path", "--task", "--train_file", "--packing", "--temporal_power"):
        assert f"  {flag} " in own
    for flag in ("--output_dir", "--learning_rate", "--no_dataloader_pin_memory"):
        assert f"  {flag} " not in own
        assert f"  {flag}" in of_the_trainer
    assert cli.main([]) == 2
    assert cli.main(["-h"]) == 0
    written = capsys.readouterr().out
    assert all(f"\n  {each} " in written for each in cli.COMMANDS)
