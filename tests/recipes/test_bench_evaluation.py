"""The benchmark of the evaluation runs at the size of a toy, and writes what it prints."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import evaluation
import pytest
import torch
from step_trainers import MODELS
from transformers import AutoConfig, AutoModelForCausalLM


def test_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "folder" / "evaluation.json"
    flags = ("--model", "toy", "--rows", "4", "--length", "16", "--batch_size", "2", "--rounds", "3", "--threads", "1")
    evaluation.main(["--output", str(output), *flags, "--shares", "1", "0.25"])
    results, printed = json.loads(output.read_text(encoding="utf-8")), capsys.readouterr().out
    rows = results["rows"]
    kinds = [(row["share"], row["target tokens"], row["trainer"]) for row in rows]
    assert kinds == [
        (1, 4 * 15, "stock Trainer"),
        (1, 4 * 15, "TemporalWeightTrainer"),
        (0.25, 4 * 4, "stock Trainer"),
        (0.25, 4 * 4, "TemporalWeightTrainer"),
    ]
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        assert len(stock["all_seconds"]) == len(ours["all_seconds"]) == 3
        ratios = [a / b for a, b in zip(ours["all_seconds"], stock["all_seconds"], strict=True)]
        assert ours["time / stock"] == statistics.median(ratios) > 0
        assert stock["inside"] is None
        assert 0 < ours["inside"] < 100
        assert f"{ours['seconds']:.3g}" in printed


def test_half_of_the_labels_are_what_the_model_ranks_first() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS["toy"])).eval()
    settings = evaluation.argparse.Namespace(seed=0, model="toy", rows=4, length=17, batch_size=2)
    rows = evaluation.rows_for(model, settings, 1.0)
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        right = model(ids).logits.argmax(-1)[:, :-1] == labels[:, 1:]
    assert right[:, 1::2].all()
    assert right[:, ::2].float().mean() < 0.2
