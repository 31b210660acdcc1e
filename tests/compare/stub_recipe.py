"""A recipe that takes no time, and what its runs leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STUB = """
import argparse, json, os, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--temporal_power", type=float)
parser.add_argument("--seed", type=int)
parser.add_argument("--output_dir", type=Path)
parser.add_argument("--config")
parser.add_argument("--fail", nargs="*", default=[])
parser.add_argument("--wait", type=Path)
parser.add_argument("--gain", type=float, default=0.1)
parser.add_argument("--offset", type=float, default=0.0)
flags = parser.parse_args()
folder = flags.output_dir
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as starts:
    starts.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\\n")
if folder.name in flags.fail:
    print("the cell's last words")
    sys.exit(3)
while flags.wait and not flags.wait.exists():
    time.sleep(0.02)
noise = flags.offset + [0.00, 0.02, -0.01, 0.015, 0.005][flags.seed] + 0.001 * flags.seed * flags.temporal_power
recall = min(1.0, 0.5 + flags.gain * min(flags.temporal_power, 4) + noise)
evaluations, profiles = [], []
for step in (0, 10, 20, 30):
    share = step / 30
    loss = 2 - share * recall
    metrics = {"recall": share * recall, "loss": loss, "head_loss": loss + 0.1, "tail_loss": loss, "gen_len": 9.0}
    metrics = {f"eval_{name}": value for name, value in metrics.items()}
    evaluations.append({"step": step, "metrics": metrics, "generated": [], "references": []})
    bins = [{"from": k / 10, "to": (k + 1) / 10, "loss": loss, "accuracy": None, "count": 5} for k in range(10)]
    profiles.append({"split": "eval", "step": step, "bins": bins})
(folder / "evaluations.json").write_text(json.dumps({"evaluations": evaluations}))
(folder / "loss_by_position.json").write_text(json.dumps({"version": 1, "profiles": profiles}))
(folder / "all_results.json").write_text("{}")
"""
LAUNCHED_DIRECTLY = """
import sys
from hf_temporal.compare import main, runs
runs.LAUNCHER = (sys.executable,)
sys.exit(main.main(sys.argv[1:]))
"""


def starts(output_dir: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text().splitlines()) for path in output_dir.glob("*/starts")}


def summary_of(output_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output_dir / "summary.json").read_text("utf-8"))
    return found
