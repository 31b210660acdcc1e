"""What a user typed wrong ends a command with one line; an error of ours keeps its traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_temporal.errors import is_users_mistake, run_script
from hf_temporal.positions import target_positions
from recipes import finetune_causal_lm, finetune_seq2seq
from tests.tiny_summarization import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder-only model, and a data file."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "llama")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "llama")
    row = {"article": "Take x1 and add it to x2.", "highlights": "Add x1."}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder


FILES = ["--train_file", "{folder}/train.jsonl", "--model_name_or_path", "{folder}/llama"]
COLUMNS = ["--text_column", "article", "--summary_column", "highlights"]


def flags_of(folder: Path, given: list[str]) -> list[str]:
    common = ["--output_dir", str(folder / "out"), "--use_cpu", "--report_to", "none", "--max_steps", "1"]
    return [flag.format(folder=folder) for flag in [*given, *common]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--do_train", "--lora_r", "x"], "argument --lora_r/--lora-r: invalid int value: 'x'"),
        (["--do_train", "--use_peft", "--lora_r", "0"], "lora_r=0; accepted: a whole number of at least 1"),
        ([*FILES, *COLUMNS, "--load_best_model_at_end"], "load_best_model_at_end"),
        (["--do_train", "--train_file", "{folder}/gone.csv"], "gone.csv' does not exist; accepted: a file"),
        ([*FILES, *COLUMNS, "--do_train", "--text_column", "body"], "text_column='body' is no column of the train"),
        ([*FILES, *COLUMNS, "--do_train", "--model_name_or_path", "no/where"], "model_name_or_path='no/where' cannot"),
        ([*FILES, *COLUMNS, "--do_train", "--tokenizer_name", "no/where"], "tokenizer_name='no/where' cannot be"),
        ([*FILES, *COLUMNS, "--do_eval"], "do_eval=True needs a validation split, and the data have: train"),
        ([*FILES, "--do_train", "--train_file", "", "--dataset_name", "no/where"], "dataset_name='no/where' with"),
    ],
)
@pytest.mark.parametrize("main", [finetune_causal_lm.main, finetune_seq2seq.main])
def test_mistakes_end_in_one_line(
    main: Callable[[list[str]], None],
    given: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TEMPORAL_PROGRAM", "hf-temporal suggest")
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: main(flags_of(folder, given)))
    code = ended.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err.strip()
    assert code
    assert said.startswith("hf-temporal suggest: ")
    assert message in said
    assert len(said.splitlines()) == 1


def test_bugs_keep_their_traceback() -> None:
    def of_python() -> None:
        int("x")

    def of_a_test() -> None:
        raise ValueError("not raised by the package")

    for main in (of_python, of_a_test):
        with pytest.raises(ValueError, match=r"x|not raised"):
            run_script(main)
    with pytest.raises(ValueError, match="accepted") as raised:
        target_positions([[1]], origin="end")  # type: ignore[arg-type]
    assert is_users_mistake(raised.value)
    assert not is_users_mistake(KeyError("x"))


IN_A_GROUP = """
from pathlib import Path

import torch
import torch._dynamo  # as every recipe has by now: DistributedDataParallel would import it, and keep the group
from accelerate import PartialState

from hf_temporal.errors import run_script


def main():
    PartialState(cpu=True)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]  # the cycle that a trainer, its callbacks and its accelerator make
    model(torch.ones(1, 2)).sum().backward()
    print("gloo" in threads())


def threads():
    return " ".join(each.read_text() for each in Path("/proc/self/task").glob("*/comm"))


run_script(main)
print("gloo" in threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system lists no threads")
def test_no_thread_of_a_process_group_outlives_the_script() -> None:
    """One that drops a tensor while the interpreter ends would abort a process that has done its work."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", IN_A_GROUP], env=os.environ | place, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("command", ["finetune-causal-lm", "suggest"])
def test_a_command_says_nothing_of_how_it_is_launched(command: str, folder: Path) -> None:
    given = flags_of(folder, [*FILES, *COLUMNS, "--do_train", "--summary_column", "gone"])
    ran = subprocess.run(
        [sys.executable, "-m", "hf_temporal.cli", command, *given],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran.stderr
    assert f"hf-temporal {command}: summary_column='gone' is no column of the train data; accepted: " in ran.stderr
    for unwanted in ("Traceback", "CalledProcessError", "The following values were not passed"):
        assert unwanted not in ran.stderr
