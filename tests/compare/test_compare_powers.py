"""The command line of a comparison over p: its flags, its commands, what is refused."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_temporal.compare import runs
from hf_temporal.compare.main import main, read_arguments

from .stub_recipe import starts

RECIPES = Path(__file__).parents[2] / "recipes"
CAUSAL = ("finetune_causal_lm.py", "configs/copying/small_llama.yaml")
SEQ2SEQ = ("finetune_seq2seq.py", "configs/copying/small_t5.yaml")
FUNCTIONAL = ("laboratory/train_functional.py", "laboratory/configs/linear_functional.yaml")


def test_dry_run_prints_commands_that_run(flags: list[str], tmp_path: Path, capsys: Any) -> None:
    """In a shell, with whatever `accelerate` is there."""
    assert main([*flags, "--powers", "0"]) == 0
    capsys.readouterr()
    config = tmp_path / "a config.yaml"
    config.touch()
    (tmp_path / "out").rename(tmp_path / "out put")
    grid = [*flags[:-1], str(tmp_path / "out put"), "--powers", "0", "-0.5", "inf"]
    assert main([*grid, "--dry_run"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 6
    assert not (tmp_path / "out put" / "p-0.5_seed0").exists()
    assert all(command.startswith("accelerate launch ") for command in commands)
    stand_in = tmp_path / "bin" / "accelerate"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} "$@"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    subprocess.run("\n".join(commands), shell=True, env=environment, check=True, executable="/bin/bash")
    assert main([*grid, "--max_parallel", "0"]) == 0
    assert set(starts(tmp_path / "out put").values()) == {1}


def test_the_command_of_a_cell(stub: Path, tmp_path: Path) -> None:
    config, accelerate = tmp_path / "small config.yaml", tmp_path / "cpu.yaml"
    config.write_text("max_steps: 3\n")
    accelerate.write_text("use_cpu: true\n")
    argv = ["--learning_rate", "-1e-3", "--config", str(config), str(stub), "--names", "a b", "c", "--metric", "loss"]
    argv += ["--powers", "-1", "0", "1e-07", "--seeds", "7", "--output_dir", "o", "--use_peft"]
    argv += ["--accelerate_config", str(accelerate)]
    comparison = read_arguments(argv)
    assert comparison.overrides == ["--learning_rate", "-1e-3", "--names", "a b", "c", "--use_peft"]
    assert shlex.split(comparison.shown(list(comparison.cells())[2])) == [
        *("accelerate", "launch", "--config_file", str(accelerate), str(stub), "--config", str(config)),
        *("--learning_rate", "-1e-3", "--names", "a b", "c", "--use_peft"),
        *("--temporal_power=1e-07", "--seed=7", "--output_dir=o/p1e-07_seed7"),
    ]


def test_the_commands_of_combinations(stub: Path) -> None:
    argv = [
        str(stub),
        "--powers",
        "0",
        "2",
        "--seeds",
        "7",
        "8",
        "--metric",
        "loss",
        "--output_dir",
        "o",
        "--gain",
        "1",
    ]
    comparison = read_arguments([*argv, "--vary", "model-name=a/b,c d", "--vary", "depth=1,2", "width=8"])
    cells = comparison.cells()
    assert [cell.folder.as_posix() for cell in list(cells)[:3]] == [
        "o/a-b_1_8/p0_seed7", "o/a-b_1_8/p2_seed7", "o/a-b_2_8/p0_seed7",
    ]  # fmt: skip
    cell = list(cells)[-1]
    assert shlex.split(cells[cell].shown(cell)) == [
        *("accelerate", "launch", str(stub), "--gain", "1", "--model_name=c d", "--depth=2", "--width=8"),
        *("--temporal_power=2", "--seed=8", "--output_dir=o/c d_2_8/p2_seed8"),
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--powers", "1", "2"], r"powers=\[1\.0, 2\.0\] lacks 0, which every other p is tested against"),
        (["--powers", "0", "nan"], r"power=nan is out of range"),
        (["--powers", "0", "1", "1.0"], r"powers=\[0\.0, 1\.0, 1\.0\] has one twice"),
        (["--powers", "0", "-0.0"], r"has one twice"),
        (["--seeds", "3", "3"], r"seeds=\[3, 3\] has one twice"),
        (["--max_parallel", "-1"], r"max_parallel=-1 is negative"),
        (["--seed", "3"], r"--seed cannot be given to every cell; accepted: --seeds"),
        (["--temporal-power=3"], r"--temporal_power cannot be given to every cell; accepted: --powers"),
        (
            ["--hub_token=hf_secret"],
            r"--hub_token cannot be given to every cell; accepted: the environment's HF_TOKEN",
        ),
        (["--metric", "eval_temporal_loss"], r"metric='temporal_loss' is weighted by each p itself"),
        (["--metric", "gen_len", "--reach", "3"], r"of gen_len neither more nor less is better"),
        (["--vary", "temporal-power=1,2"], r"vary: temporal_power cannot be varied; accepted: a flag that is the re"),
        (["--vary", "seed=1,2"], r"vary: seed cannot be varied"),
        (["--vary", "output_dir=a,b"], r"vary: output_dir cannot be varied"),
        (["--vary", "hub_token=hf_secret"], r"vary: hub_token cannot be varied"),
        (["--vary", "config=a.yaml,b.yaml"], r"vary: config cannot be varied"),
        (["--vary", "gain"], r"vary: gain= lacks a name or a value; accepted: NAME=VALUE,VALUE,\.\.\."),
        (["--vary", "gain=1,,2"], r"vary: gain=1,,2 lacks a name or a value"),
        (["--vary", "=1,2"], r"vary: =1,2 lacks a name or a value"),
        (["--vary", "gain=1,2,1"], r"vary: gain=1,2,1 has one twice; accepted: each once"),
        (["--vary", "gain=1,2", "--vary", "gain=3"], r"vary=\['gain=1,2', 'gain=3'\] has a name twice"),
        (["--vary", "gain=1_1,1", "offset=1,1_1"], r"makes a folder '1_1_1'; accepted: values that, joined by _, "),
        (["--vary", "gain=.."], r"makes a folder '\.\.'"),
        (["--vary", "gain=1,2", "--gain", "1"], r"--gain is varied and given to every cell, too; accepted: one of"),
        (["--vary", "max_gain=1,2", "--max-gain=1"], r"--max_gain is varied and given to every cell"),
        (["--config", "nowhere.yaml"], r"config='nowhere.yaml' is no file: there is no /.*/nowhere.yaml; accepted: a"),
        (["--accelerate_config", "no.yaml"], r"accelerate_config='no.yaml' is no file: there is no /.*/no.yaml; acc"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    flags: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        main([*flags, *more])
    assert "hf_secret" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    argv = ["--powers", "0", "1", "--seeds", "0", "--metric", "loss", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"recipe='nowhere.py' is no file"):
        main(["nowhere.py", *argv])


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        (
            CAUSAL,
            ["--learning_rat", "1"],
            r"--learning_rat is no argument of this recipe; the nearest is --learning_rate",
        ),
        (CAUSAL, ["--learning_rate", "fast"], r"argument --learning_rate.*: invalid float value: 'fast'"),
        (CAUSAL, ["--vary", "blank_lengt=1,2"], r"--blank_lengt is no argument .* the nearest is --blank_length"),
        (CAUSAL, ["--vary", "copy_length=2,0"], r"copy_length=0"),
        (CAUSAL, ["--temporal_mixture", "2"], r"temporal_mixture=2\.0"),
        (
            CAUSAL,
            ["--metric", "recal"],
            r"(?s)metric='recal' is not measured; accepted: .*, recall, .*nearest is 'recall'",
        ),
        (
            CAUSAL,
            ["--metric", "rouge1"],
            r"metric='rouge1' is not measured; accepted: blank_accuracy, chain_accuracy, empty",
        ),
        (
            CAUSAL,
            ["--do_eval=false", "--eval_strategy=no"],
            r"metric='recall', but do_eval=False measures nothing; accepted: with --do_",
        ),
        (SEQ2SEQ, ["--predict_with_generate", "false"], r"accepted: with --predict_with_generate"),
        (FUNCTIONAL, ["--metric", "recall"], r"metric='recall' is not measured; accepted: .*long_memory_error"),
    ],
)
def test_flags_of_a_recipe_are_read_before_anything_runs(
    recipe: tuple[str, str], more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "start", None)
    script, config = (str(RECIPES / name) for name in recipe)
    grid = ["--powers", "0", "1", "--seeds", "0", "--metric", "recall", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        main([script, "--config", config, *grid, *more])
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_measures_is_accepted(tmp_path: Path, capsys: Any) -> None:
    script, config = (str(RECIPES / name) for name in CAUSAL)
    for metric in ("recall", "recall_low", "loss", "tail_loss", "grad_norm", "eval_exact_match"):
        grid = ["--powers", "0", "--seeds", "0", "--metric", metric, "--output_dir", str(tmp_path), "--bf16"]
        assert main([script, "--config", config, *grid, "--dry_run"]) == 0  # for a machine that has bf16
        assert "--bf16 --temporal_power=0" in capsys.readouterr().out


def test_an_error_is_one_line_and_help_is_that_of_the_command(tmp_path: Path) -> None:
    script = [sys.executable, str(RECIPES / "compare_powers.py")]
    command = [sys.executable, "-m", "hf_temporal.cli", "compare"]
    grid = ["--powers", "0", "--seeds", "0", "--metric", "los", "--output_dir", str(tmp_path / "out")]
    for program, start in ((script, "compare_powers.py: "), (command, "hf-temporal: ")):
        wrong = subprocess.run(
            [*program, str(RECIPES / CAUSAL[0]), *grid], capture_output=True, text=True, check=False
        )
        assert wrong.returncode != 0
        assert wrong.stderr.splitlines()[-1].startswith(f"{start}metric='los' is not measured; accepted: ")
        assert "Traceback" not in wrong.stderr
    for program, usage in ((script, "python recipes/compare_powers.py"), (command, "hf-temporal compare")):
        shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout
        assert shown.startswith(f"usage: {usage} [recipe.py | --grid FILE.yaml]")
        assert "None" not in shown
        assert "(default: 1)" in shown
        missing = subprocess.run([*program, "--powers", "0"], capture_output=True, text=True, check=False)
        assert missing.stderr.startswith(f"usage: {usage} [recipe.py")
        assert "the following arguments are required: " in missing.stderr


@pytest.mark.parametrize("left", ["nothing", "unfinished", "running", "finished"])
def test_a_first_try_blocks_the_folder_only_where_a_cell_is_finished_or_runs(
    left: str, flags: list[str], tmp_path: Path
) -> None:
    flags = [*flags, "--powers", "0", "--seeds", "0", "1"]
    assert main([*flags, "--gain", "0.1", "--fail", "p0_seed1" if left == "finished" else "p0_seed0"]) == 1
    second = [*flags, "--gain", "0.2"]
    if left == "nothing":
        shutil.rmtree(tmp_path / "out" / "p0_seed0")
    if left in ("nothing", "unfinished"):
        assert main(second) == 0
        return
    with (tmp_path / "out" / "p0_seed0" / "log.txt").open("ab") as log:
        if left == "running":
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match=r"holds a comparison with overrides=\['--gain', '0\.1'"):
            main(second)


def test_a_yaml_that_is_none_is_told(flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [", encoding="utf-8")
    for flag in ("grid", "config", "accelerate_config"):
        with pytest.raises(ValueError, match=rf"(?s){flag}='.*broken.yaml' cannot be read: .*; accepted: a YAML file"):
            main([*flags, f"--{flag}", str(path)])


def test_another_comparison_does_not_go_on_in_the_same_folder(flags: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_steps: 3  # first\n")
    flags = [*flags, "--powers", "0", "--seeds", "0", "--config", str(config)]
    assert main([*flags, "--dry_run"]) == 0
    assert main([*flags, "--gain", "0.2"]) == 0  # nothing had run yet, so nothing is bound to be the same
    with pytest.raises(
        ValueError, match=r"overrides=\['--gain', '0\.3'\], but output_dir=.*'0\.2'.*another output_dir"
    ):
        main([*flags, "--gain", "0.3"])
    config.write_text("max_steps: 3  # second\n")
    assert main([*flags, "--gain", "0.2"]) == 0
    with pytest.raises(ValueError, match=r"vary=\['offset'\], but output_dir=.* with vary=None"):
        main([*flags, "--gain", "0.2", "--vary", "offset=0,1"])
    config.write_text("max_steps: 4\n")
    with pytest.raises(
        ValueError, match=r"config=\{'max_steps': 4\}, but output_dir=.* with config=\{'max_steps': 3\}"
    ):
        main([*flags, "--gain", "0.2"])


def test_other_varied_flags_do_not_go_on_in_the_same_folder(flags: list[str]) -> None:
    flags = [*flags, "--powers", "0", "--seeds", "0"]
    assert main([*flags, "--vary", "gain=0.1", "offset=0"]) == 0
    for vary in (["offset=0", "gain=0.1"], ["gain=0.1"]):
        with pytest.raises(
            ValueError, match=r"vary=\['(offset', ')?gain'\], but output_dir=.* with vary=\['gain', 'offset'"
        ):
            main([*flags, "--vary", *vary])
    with pytest.raises(ValueError, match=r"vary=None, but output_dir=.* with vary=\['gain', 'offset'\]"):
        main(flags)
    assert main([*flags, "--vary", "gain=0.1,0.2", "offset=0", "--dry_run"]) == 0
