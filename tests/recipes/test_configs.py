"""Every shipped YAML is read by the script that it is for; files and flags together."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from hf_temporal.tasks.summarization import SummarizationArguments
from hf_temporal.training_args import TemporalSeq2SeqTrainingArguments, TemporalTrainingArguments
from recipes.configuration import parse
from recipes.finetune_causal_lm import CausalModelArguments
from recipes.summarization_run import ModelArguments

RECIPES = Path(__file__).parents[2] / "recipes"
CAUSAL = (CausalModelArguments, SummarizationArguments, TemporalTrainingArguments)
SEQ2SEQ = (ModelArguments, SummarizationArguments, TemporalSeq2SeqTrainingArguments)
KINDS = {"finetune_causal_lm.py": CAUSAL, "finetune_seq2seq.py": SEQ2SEQ}


def script_of(config: str) -> str:
    """The script whose docstring runs the file."""
    scripts = [path.name for path in RECIPES.glob("*.py") if config in path.read_text("utf-8")]
    assert len(scripts) == 1, f"{config} belongs to {scripts}"
    return scripts[0]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("configs/summarization/*.yaml")), ids=lambda path: path.name)
def test_every_config_is_read_by_its_script(path: Path) -> None:
    config = path.relative_to(RECIPES.parent).as_posix()
    model_args, data_args, training_args = parse(KINDS[script_of(config)], ["--config", str(path)])
    assert model_args.model_name_or_path is None
    assert data_args.dataset_name is None
    assert training_args.temporal_power == 1
    assert training_args.output_dir == f"outputs/{path.stem}"
    assert training_args.do_train
    assert training_args.do_eval
    assert data_args.max_eval_samples >= 64


@pytest.mark.parametrize("path", sorted(RECIPES.glob("accelerate/*cpu*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_config_is_read(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.use_cpu
    assert config.num_processes == (2 if path.stem.startswith("ddp") else 1)


@pytest.mark.parametrize("script", sorted(KINDS))
def test_recipes_open_with_commands_that_parse(script: str) -> None:
    """One that is full, one for a look; the flags of every command are those of the recipe."""
    text = (RECIPES / script).read_text("utf-8").split('"""')[1]
    commands = re.findall(r"accelerate launch (?:--num_processes \d+ )?recipes/(\S+)((?:[^\n]|\\\n)*)", text)
    assert len(commands) == 3
    for name, flags in commands:
        assert name == script
        argv = [flag.strip('"') for flag in re.findall(r'"[^"]*"|[^\s\\]+', flags.replace("\\\n", " "))]
        argv = [str(RECIPES.parent / flag) if flag.endswith(".yaml") else flag for flag in argv]
        parse(KINDS[script], [flag for flag in argv if flag != "--bf16"])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    lines = [
        "output_dir: somewhere",
        "learning_rate: 1e-4",
        "temporal_power: .inf",
        "num_beams: 3",
        'source_prefix: "- in short: "',
        "use_peft: true",
        "lora_target_modules: [q_proj, v_proj]",
        "max_eval_samples: null",
        "do_eval: false",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_values_of_a_file_are_read_as_flags_are(config: Path) -> None:
    model_args, data_args, training_args = parse(CAUSAL, ["--config", str(config)])
    assert training_args.learning_rate == 1e-4  # YAML 1.1 takes it for a text
    assert training_args.temporal_power == math.inf
    assert training_args.do_eval is False
    assert data_args.num_beams == 3
    assert data_args.source_prefix == "- in short: "
    assert data_args.max_eval_samples is None
    assert model_args.use_peft is True
    assert model_args.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("first", [True, False])
def test_flags_override_the_file(config: Path, first: bool) -> None:
    flags = ["--num_beams", "5", "--temporal-power", "0.5", "--use_peft", "false", "--lora_target_modules", "k_proj"]
    argv = ["--config", str(config)]
    model_args, data_args, training_args = parse(CAUSAL, [*argv, *flags] if first else [*flags, *argv])
    assert data_args.num_beams == 5
    assert training_args.temporal_power == 0.5
    assert training_args.learning_rate == 1e-4
    assert model_args.use_peft is False
    assert model_args.lora_target_modules == ["k_proj"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("temporal_pwer: 2", "'temporal_pwer' is no argument of this recipe; the nearest is 'temporal_power'"),
        (
            "max_source_lenght: 2",
            "'max_source_lenght' is no argument of this recipe; the nearest is 'max_source_length'",
        ),
        ("- 3", "holds a list; accepted: lines of the form `name: value`"),
    ],
)
def test_unknown_keys_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(CAUSAL, ["--config", str(path)])


@pytest.mark.parametrize("flags", [["--max_source_lenght", "3"], ["--max_source_lengt=3"]])
def test_unknown_flags_are_refused(flags: list[str]) -> None:
    with pytest.raises(ValueError, match=r"is no argument of this recipe; the nearest is --max_source_length"):
        parse(CAUSAL, flags)


@pytest.mark.parametrize(
    "lines", ["learning_rate: fast", "temporal_origin: start", "max_steps: 1.5", "use_peft: maybe", "dtype: int8"]
)
def test_bad_values_of_a_file_name_the_argument(tmp_path: Path, lines: str, capsys: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(CAUSAL, ["--config", str(path)])
    assert f"--{lines.partition(':')[0]}" in capsys.readouterr().err


def test_a_file_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']", encoding="utf-8")
    with pytest.raises(Exception, match="could not determine a constructor"):
        parse(CAUSAL, ["--config", str(path)])
    assert not (tmp_path / "made").exists()
