"""Runs cases in one process group; started by `launch`, which hands back what the first process found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import Trainer

from hf_temporal import TemporalWeightTrainer
from tests.distributed import cases
from tests.test_fused_head import check_a_sharded_head
from tests.tiny_training import Steps

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "recipes" / "accelerate" / "ddp_cpu.yaml"


def launch(processes: int, folder: Path, *groups: str) -> dict[str, dict[str, Any]]:
    """Run the groups of cases, by their names in `cases`, on so many processes of `accelerate launch`."""
    subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ENGINE),
            "--num_processes", str(processes), __file__, str(folder), str(processes), *groups,
        ],
        check=True, timeout=1800, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = torch.load(folder / "found.pt")
    return found


def train(case: cases.TrainingCase, processes: int, folder: Path, kind: type[Trainer]) -> dict[str, Any]:
    """What a case logged and how it moved the parameters, which are the same on all processes."""
    steps = case.run(processes, folder, trainer=kind)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate leaves it behind
    assert steps.trainer is not None
    assert steps.trainer.args.world_size == torch.distributed.get_world_size() == processes
    ranks = gather(torch.cat([value.flatten() for value in steps.parameters.values()])[None])
    assert len(ranks) == processes
    assert all(torch.equal(rank, ranks[0]) for rank in ranks), f"{case}: the ranks drifted apart"
    return trained(steps)


def trained(steps: Steps) -> dict[str, Any]:
    """What is compared of a training run."""
    return {"steps": [log for log in steps.logs if "grad_norm" in log], "update": steps.update} | {
        key: value for log in steps.logs for key, value in log.items() if key.startswith("eval_")
    }


def main(folder: Path, processes: int, groups: Sequence[str]) -> None:
    """Every case of the groups, and the stock trainer where it is what a case is compared with."""
    torch.set_num_threads(1)
    PartialState(cpu=True)
    check_a_sharded_head()
    found: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for group, results in found.items():
        for name, case in getattr(cases, group).items():
            place = folder / group / name
            if isinstance(case, cases.EvaluationCase):
                results[name] = {
                    "metrics": case.run(processes, place),
                    "stock": case.run(processes, folder / "stock", stock=True),
                }
                continue
            results[name] = train(case, processes, place, TemporalWeightTrainer)
            if case.stock:
                results[name]["stock"] = train(case, processes, folder / "stock", Trainer)
    if PartialState().is_main_process:
        torch.save(found, folder / "found.pt")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush()
    # The device mesh keeps gloo's threads: one that drops a tensor while the interpreter ends aborts the process.
    os._exit(0)
