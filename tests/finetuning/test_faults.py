"""Runs that are killed, fill the disk, lose a worker or meet a NaN: nothing is lost, and the end is the same."""

from __future__ import annotations

import math
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_temporal import TemporalTrainingArguments
from hf_temporal.compare.cells import Cell
from hf_temporal.finetuning.continuation import check_checkpoint, continue_run
from hf_temporal.finetuning.report import load_evaluations
from recipes.laboratory.train_functional import main

from .faulty_runs import DiskFull, KilledWhileSaving, NotANumber, Run, WorkerKilled, flags, status_of

FILES = (
    "model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)
KILLS = 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run")
    main(flags(run.folder))
    assert sorted(run.complete) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    return run


def assert_kept(before: dict[str, dict[str, bytes]], run: Run) -> None:
    """Not written anew either: `trainer_state.json` holds times."""
    after = run.complete
    assert {name: after.get(name) for name in before} == before


# ---- death


def test_killed_at_any_moment(undisturbed: Run, tmp_path: Path) -> None:
    assert Run(tmp_path / "first").end() == 0  # which starts the server that the others are forked from
    begin = time.monotonic()
    assert Run(tmp_path / "timed").end() == 0
    duration = time.monotonic() - begin
    run, moments, statuses = Run(tmp_path / "run"), random.Random(0), []
    for _ in range(KILLS):
        before = run.complete
        process = run.start()
        time.sleep(moments.uniform(0.2, 0.9) * duration)
        process.kill()
        statuses.append(status_of(process))
        assert_kept(before, run)
    assert -signal.SIGKILL in statuses
    assert set(statuses) <= {-signal.SIGKILL, 0}, run.log
    before = run.complete
    assert run.end() == 0, run.log
    assert_kept(before, run)
    run.assert_ends_as(undisturbed)


def test_killed_in_every_file_of_a_checkpoint(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for file in range(len(FILES)):  # of the first checkpoint; then, as that one is complete, of the second
        before = run.complete
        assert run.end(fault=KilledWhileSaving(file if before else file + len(FILES))) == -signal.SIGKILL, run.log
        assert_kept(before, run)
        assert [*run.complete] == ["checkpoint-2"]
        cut_off, whole = (each.folder / "checkpoint-4" / FILES[file] for each in (run, undisturbed))
        assert 0.4 < cut_off.stat().st_size / whole.stat().st_size < 0.6
    assert "checkpoint-4 was not written to its end and is left out" in run.log
    assert run.end() == 0, run.log
    run.assert_ends_as(undisturbed)


def test_disk_full(undisturbed: Run, tmp_path: Path) -> None:
    run, log = Run(tmp_path / "run"), ""
    before: dict[str, dict[str, bytes]] = {}
    for size, message in [(400, "File too large"), (12_000, "File too large"), (30_000, "unexpected pos")]:
        assert run.end(fault=DiskFull(size)) == 1
        assert message in run.log.removeprefix(log)
        assert_kept(before, run)
        before, log = run.complete, run.log
        assert before.keys() == {"checkpoint-2"}
    assert run.end() == 0, run.log
    assert_kept(before, run)
    run.assert_ends_as(undisturbed)


def test_data_worker_killed(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert run.end("--dataloader_num_workers", "1", fault=WorkerKilled(9)) == 1
    before = run.complete
    assert "checkpoint-2" in before
    assert run.end("--dataloader_num_workers", "1") == 0, run.log
    assert_kept(before, run)
    run.assert_ends_as(undisturbed)


def test_a_loss_that_is_not_a_number(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "p1_seed0")
    assert run.end(fault=NotANumber(5)) == 1
    assert "FloatingPointError: input.weight is not finite after step 3: a loss or its gradient was not" in run.log
    assert sorted(each.name for each in run.folder.glob("checkpoint-*")) == ["checkpoint-2"]
    assert run.evaluated == [0, 2, 6]
    assert all(math.isnan(value) for value in load_evaluations(run.folder)[-1]["metrics"].values())
    cell = Cell(1.0, 0, tmp_path)
    assert cell.finished
    assert math.isnan(cell.evaluations("loss")[6]["loss"])
    before = run.complete
    assert run.end() == 0, run.log
    assert_kept(before, run)
    run.assert_ends_as(undisturbed)


# ---- damage


@pytest.fixture
def damaged(undisturbed: Run, tmp_path: Path) -> Run:
    shutil.copytree(undisturbed.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "altered": alter,
    "removed": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "config.json", "modeling.py"])
def test_a_damaged_checkpoint_is_refused_by_name(name: str, damage: str, damaged: Run) -> None:
    newest = damaged.folder / "checkpoint-6"
    DAMAGES[damage](newest / name)
    for flag in ([], ["--resume_from_checkpoint", str(newest)]):
        with pytest.raises(ValueError, match=r"accepted: --resume_from_checkpoint last_good") as refused:
            main([*flags(damaged.folder), *flag])
        message = str(refused.value)
        assert str(newest) in message
        assert name in message or (damage == "removed" and message.startswith(f"{newest} holds no "))


@pytest.mark.parametrize("name", [name for name in FILES if name != "trainer_state.json"])
@pytest.mark.parametrize("damage", ["cut off", "halved", "emptied"])
def test_a_damaged_checkpoint_without_checksums_is_refused_too(name: str, damage: str, damaged: Run) -> None:
    newest = damaged.folder / "checkpoint-6"
    (newest / "checksums.json").unlink()
    check_checkpoint(newest, with_optimizer=True)
    DAMAGES[damage](newest / name)
    with pytest.raises(ValueError, match=f"{name} is cut off or altered"):
        check_checkpoint(newest, with_optimizer=True)


def test_shards_that_an_index_names_are_missed(damaged: Run) -> None:
    newest = damaged.folder / "checkpoint-6"
    (newest / "model.safetensors.index.json").write_text('{"weight_map": {"head.weight": "model-00001-of-00002"}}')
    with pytest.raises(ValueError, match=r"index.json is cut off.*model-00001-of-00002, which is not there"):
        check_checkpoint(newest, with_optimizer=True)


def test_the_last_good_checkpoint_is_gone_on_from(undisturbed: Run, damaged: Run) -> None:
    alter(damaged.folder / "checkpoint-4" / "model.safetensors")
    DAMAGES["halved"](damaged.folder / "checkpoint-6" / "optimizer.pt")
    (damaged.folder / "damaged-checkpoint-6").mkdir()  # of an earlier time
    assert damaged.end("--resume_from_checkpoint", "last_good") == 0, damaged.log
    assert "checkpoint-6/optimizer.pt is cut off or altered" in damaged.log
    assert "checkpoint-4 is set aside" in damaged.log
    assert "holds step 2 of 6 of this run, which goes on from there" in damaged.log
    aside = {path.name for path in damaged.folder.glob("damaged-*") if any(path.iterdir())}
    assert aside == {"damaged-checkpoint-4", "damaged-checkpoint-6-1"}
    assert sorted(damaged.complete) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    damaged.assert_ends_as(undisturbed)


def test_no_checkpoint_is_good(damaged: Run) -> None:
    for step in (2, 4, 6):
        DAMAGES["emptied"](damaged.folder / f"checkpoint-{step}" / "scheduler.pt")
    with pytest.raises(
        ValueError, match=r"no checkpoint is whole: .*checkpoint-6.*checkpoint-4.*checkpoint-2"
    ) as all_:
        main([*flags(damaged.folder), "--resume_from_checkpoint", "last_good"])
    assert "accepted: another output_dir" in str(all_.value)
    assert len([*damaged.folder.glob("checkpoint-*")]) == 3


@pytest.mark.parametrize("asked", ["last_good", None])
def test_a_run_without_a_checkpoint_begins(asked: str | None, tmp_path: Path) -> None:
    arguments = TemporalTrainingArguments(str(tmp_path), resume_from_checkpoint=asked, use_cpu=True)
    assert continue_run(arguments, {}).checkpoint is None


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    arguments = TemporalTrainingArguments(str(tmp_path), resume_from_checkpoint="nowhere", use_cpu=True)
    with pytest.raises(ValueError, match="nowhere is not there; accepted: --resume_from_checkpoint last_good"):
        continue_run(arguments, {})
