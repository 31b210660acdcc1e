"""Every shipped YAML is read by the script that it is for; files and flags together."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from hf_temporal.compare.main import read_arguments
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.controls import ControlArguments
from hf_temporal.finetuning.functional import FunctionalArguments
from hf_temporal.finetuning.models import ModelArguments
from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS, SEQ2SEQ_ARGUMENTS
from hf_temporal.training_args import TemporalTrainingArguments
from recipes.laboratory import finetune_with_control, gradients_by_lag

RECIPES = Path(__file__).parents[2] / "recipes"
CAUSAL, SEQ2SEQ = CAUSAL_ARGUMENTS, SEQ2SEQ_ARGUMENTS
FUNCTIONAL = (ModelArguments, FunctionalArguments, ControlArguments, TemporalTrainingArguments)
KINDS = {
    "finetune_causal_lm.py": CAUSAL,
    "finetune_seq2seq.py": SEQ2SEQ,
    "laboratory/finetune_with_control.py": finetune_with_control.ARGUMENTS,
    "laboratory/gradients_by_lag.py": gradients_by_lag.ARGUMENTS,
    "laboratory/train_functional.py": FUNCTIONAL,
}
COMMANDS = dict(zip(KINDS, (3, 3, 2, 2, 2), strict=True))
TASKS = {"copying": "copying", "summarization": "summarization"}
COMMAND = re.compile(
    r"accelerate launch (?:--config_file (?P<engine>\S+) |--num_processes \d+ )?recipes/(?P<script>\S+)"
    r"(?P<flags>(?:\\\n|[^\n])*)"
)


def parsed(script: str, flags: str) -> dict[str, Any]:
    """The arguments of a command by name, without the flags that need a GPU."""
    argv = [flag for flag in shlex.split(flags.replace("\\\n", " ")) if flag != "--bf16"]
    argv = [str(RECIPES.parent / flag) if flag.endswith(".yaml") else flag for flag in argv]
    return {name: value for each in parse(KINDS[script], argv) for name, value in vars(each).items()}


@pytest.fixture(autouse=True)
def _as_if_there_were_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("configs/*/*.yaml")), ids=lambda path: path.stem)
def test_every_config_opens_with_its_command(path: Path) -> None:
    comment = "\n".join(line[1:] for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
    (command,) = COMMAND.finditer(comment)
    arguments = parsed(command["script"], command["flags"])
    assert command["flags"].strip().endswith(path.relative_to(RECIPES.parent).as_posix())
    assert arguments.get("task") == TASKS[path.parent.name]
    assert arguments["output_dir"].startswith("outputs/")
    assert arguments["temporal_power"] == 1
    assert arguments["do_train"]
    assert arguments["do_eval"]
    assert arguments.get("max_eval_samples", arguments.get("eval_samples", 0)) >= 64
    assert command["engine"] is None or load_config_from_file(str(RECIPES.parent / command["engine"]))


ENGINES = {
    "cpu": ("NO", 1),
    "ddp": ("MULTI_GPU", 8),
    "ddp_cpu": ("MULTI_GPU", 2),
    "deepspeed_zero2": ("DEEPSPEED", 8),
    "deepspeed_zero3": ("DEEPSPEED", 8),
    "fsdp2": ("FSDP", 8),
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_config_is_read(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert (config.distributed_type.value, config.num_processes) == ENGINES[path.stem]
    assert config.use_cpu == ("cpu" in path.stem)
    if path.stem.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("script", sorted(KINDS))
def test_recipes_open_with_commands_that_parse(script: str) -> None:
    """One that is full, one for a look; the flags of every command are those of the recipe."""
    text = (RECIPES / script).read_text("utf-8").split('"""')[1].replace("$'", "'")
    commands = [*COMMAND.finditer(text)]
    assert len(commands) == COMMANDS[script]
    for command in commands:
        assert command["script"] == script
        parsed(script, command["flags"])


def comparisons_in(text: str) -> list[str]:
    """The commands of `compare_powers.py`, whose flags and combinations are those of their recipe."""
    commands: list[str] = re.findall(r"python recipes/compare_powers\.py (recipes(?:\\\n|[^\n])*)", text)
    for command in commands:
        flags = shlex.split(command.replace("\\\n", " "))
        argv = [str(RECIPES.parent / flag) if flag.startswith("recipes/") else flag for flag in flags]
        for combination in read_arguments(argv).combinations():
            of_cells = shlex.join(["--config", str(combination.arguments.config), *combination.overrides])
            arguments = parsed(combination.recipe.name, of_cells)
            assert {name: str(arguments[name]) for name in combination.values} == {
                name: str(type(arguments[name])(value)) for name, value in combination.values.items()
            }
    return commands


def test_commands_of_comparisons_parse() -> None:
    assert len(comparisons_in((RECIPES / "compare_powers.py").read_text("utf-8"))) == 3


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
    model_args, _, data_args, summarization_args, *_, training_args = parse(CAUSAL, ["--config", str(config)])
    assert training_args.learning_rate == 1e-4  # YAML 1.1 takes it for a text
    assert training_args.temporal_power == math.inf
    assert training_args.do_eval is False
    assert summarization_args.num_beams == 3
    assert summarization_args.source_prefix == "- in short: "
    assert data_args.max_eval_samples is None
    assert model_args.use_peft is True
    assert model_args.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("first", [True, False])
def test_flags_override_the_file(config: Path, first: bool) -> None:
    flags = ["--num_beams", "5", "--temporal-power", "0.5", "--use_peft", "false", "--lora_target_modules", "k_proj"]
    argv = ["--config", str(config)]
    parsed = parse(CAUSAL, [*argv, *flags] if first else [*flags, *argv])
    model_args, _, _, summarization_args, *_, training_args = parsed
    assert summarization_args.num_beams == 5
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


def test_the_value_of_an_unknown_flag_is_not_printed() -> None:
    with pytest.raises(
        ValueError, match="--hub_tokn is no argument of this recipe; the nearest is --hub_token"
    ) as told:
        parse(CAUSAL, ["--hub_tokn=secret"])
    assert "secret" not in str(told.value)


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
