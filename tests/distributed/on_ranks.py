"""Runs cases in one process group; started by `launch`, which hands back what the first process found."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import Trainer

from hf_temporal import TemporalWeightTrainer
from tests.distributed import cases
from tests.linear_cross_entropy.test_function_wrapped import check_a_sharded_head
from tests.tiny_training import Steps

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "recipes" / "accelerate" / "ddp_cpu.yaml"


def launch(processes: int, folder: Path, *groups: str, machines: int = 1) -> dict[str, dict[str, Any]]:
    """Run the groups of cases, by their names in `cases`, on so many processes of `accelerate launch`.

    With several `machines` as many launchers each start their share, and meet at a port of this one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    launchers = [
        subprocess.Popen(
            [
                sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ENGINE),
                *([*several, "--machine_rank", str(rank)] if machines > 1 else []),
                "--num_processes", str(processes), __file__, str(folder), str(processes), str(machines), *groups,
            ],
            cwd=ROOT, env={
                **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                "DS_ACCELERATOR": "cpu",
            },
        )
        for rank in range(machines)
    ]  # fmt: skip
    try:
        assert [launcher.wait(1800) for launcher in launchers] == [0] * machines
    finally:
        for launcher in launchers:
            launcher.terminate()
    found: dict[str, dict[str, Any]] = torch.load(folder / "found.pt")
    return found


def train(case: cases.TrainingCase, processes: int, folder: Path, kind: type[Trainer]) -> dict[str, Any]:
    """What a case logged and how it moved the parameters, which are the same on all processes."""
    steps = case.run(processes, folder, trainer=kind)
    for left_behind in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(left_behind, None)
    assert steps.trainer is not None
    assert steps.trainer.args.world_size == torch.distributed.get_world_size() == processes
    assert steps.trainer.is_deepspeed_enabled == ("deepspeed" in case.engine)
    ranks = gather(torch.cat([value.flatten() for value in steps.parameters.values()])[None])
    assert len(ranks) == processes
    assert all(torch.equal(rank, ranks[0]) for rank in ranks), f"{case}: the ranks drifted apart"
    return trained(steps)


def trained(steps: Steps) -> dict[str, Any]:
    """What is compared of a training run."""
    return {"steps": [log for log in steps.logs if "grad_norm" in log], "update": steps.update} | {
        key: value for log in steps.logs for key, value in log.items() if key.startswith("eval_")
    }


def main(folder: Path, processes: int, machines: int, groups: Sequence[str]) -> None:
    """Every case of the groups, and the stock trainer where it is what a case is compared with."""
    torch.set_num_threads(1)
    PartialState(cpu=True)
    assert int(os.environ["GROUP_WORLD_SIZE"]) == machines
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
    # Else the head would multiply in float32, and full logits in bfloat16, on processors without bfloat16.
    with mock.patch.object(torch.cpu, "get_capabilities", create=True, return_value={"avx512_bf16": True}):
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    sys.stdout.flush()
    # The device mesh keeps gloo's threads: one that drops a tensor while the interpreter ends aborts the process.
    os._exit(0)
