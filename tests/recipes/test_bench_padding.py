"""The benchmark of padding counts what the recipes' collators make, and its orders are those of the Trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import padding
import pytest
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_temporal.finetuning import recipe
from hf_temporal.finetuning.configuration import parse
from tests.tiny_run import Tiny


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "VOCABULARY", 320)
    monkeypatch.setattr(padding, "BATCH", 2)
    monkeypatch.setenv("HF_TEMPORAL_CACHE", str(tmp_path / "cache"))


def test_shares_by_hand() -> None:
    sides = {"encoder": [5, 2, 3, 4, 7], "decoder": [1, 2, 2, 2, 3]}
    shares = padding.padding(sides, [[0, 1], [3, 2], [4]])
    assert shares == pytest.approx({"encoder": 1 - 21 / 25, "decoder": 1 - 10 / 11, "all": 1 - 31 / 36})
    assert padding.padding({"decoder": [5, 2]}, [[0], [1]]) == {"decoder": 0, "all": 0}


def test_beginnings_by_hand() -> None:
    rows = [[*range(10)], [*range(9), 0, 0], [*range(9)], [0], [0]]
    assert padding.beginning_alike(rows, [[0, 1, 2], [3, 4]]) == 2 * 8 / 32
    assert padding.beginning_alike(rows, [[0, 1], [2, 3], [4]]) == 9 / 32
    assert padding.beginning_alike([row[:8] for row in rows], [[0, 1, 2]]) == 0


def _prepared(tiny: Tiny, tmp_path: Path, kind: str, *more: str) -> Any:
    given = [*tiny.data_flags, "--do_eval", "--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", *more]
    given += ["--max_train_samples", "23"]  # the last batch is a single row
    if kind == "seq2seq":
        return recipe.prepare_seq2seq(parse(recipe.SEQ2SEQ_ARGUMENTS, given))
    return recipe.prepare_causal_lm(parse(recipe.CAUSAL_ARGUMENTS, [*given, "--model_name_or_path", str(tiny.model)]))


def test_encoder_decoder(tiny: Tiny, tmp_path: Path) -> None:
    run = _prepared(tiny, tmp_path, "seq2seq")
    orders = padding.orders(padding.sides_of(run), seed=0)
    assert [*orders] == ["random", "group_by_length", "by source + target"]
    _check_shares(run, orders, {"encoder": ("input_ids", 0), "decoder": ("labels", -100)})
    assert orders["group_by_length"] == _batches(dataset=run.splits["train"])
    both = [len(row["input_ids"]) + len(row["labels"]) for row in run.splits["train"]]
    assert orders["by source + target"] == _batches(lengths=both)


def test_decoder_only(tiny: Tiny, tmp_path: Path) -> None:
    run = _prepared(tiny, tmp_path, "causal", "--padding_free", "off")
    orders = padding.orders(padding.sides_of(run), seed=0)
    rows = orders.pop("padding_free")
    assert [*orders] == ["random", "group_by_length"]
    _check_shares(run, orders, {"decoder": ("attention_mask", 0)})
    assert orders["group_by_length"] == _batches(dataset=run.splits["train"])

    one_row = _prepared(tiny, tmp_path, "causal").data_collator(run.splits["train"].to_list())
    assert one_row["input_ids"].numel() == sum(padding.sides_of(run)["decoder"])
    assert padding.padding(padding.sides_of(run), rows)["all"] == 0


def _batches(**rows: Any) -> list[Any]:
    """Those of the sampler of a Trainer, which is given the rows or their lengths."""
    order = [*LengthGroupedSampler(2, generator=torch.Generator().manual_seed(0), **rows)]
    return [order[start : start + 2] for start in range(0, len(order), 2)]


def _check_shares(run: Any, orders: dict[str, list[list[int]]], padded: dict[str, tuple[str, int]]) -> None:
    """Each order has every row once, and the share of the padding value in what the run's collator makes of it."""
    examples = run.splits["train"].to_list()
    for batches in orders.values():
        assert sorted(row for batch in batches for row in batch) == [*range(23)]
        made = [run.data_collator([examples[row] for row in batch]) for batch in batches]
        empty = {side: sum(int((each[key] == pad).sum()) for each in made) for side, (key, pad) in padded.items()}
        every = {side: sum(each[key].numel() for each in made) for side, (key, _) in padded.items()}
        expected = {side: empty[side] / every[side] for side in padded}
        expected["all"] = sum(empty.values()) / sum(every.values())
        assert padding.padding(padding.sides_of(run), batches) == pytest.approx(expected)
        assert expected["all"] > 0


def test_a_table_of_both_recipes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = {kind: _prepared(tiny, tmp_path, kind) for kind in ("causal", "seq2seq")}
    given = []

    def prepare(parsed: Sequence[Any]) -> Any:
        given.append((parsed[3].max_source_length, parsed[3].max_target_length, parsed[-1].do_train))
        return prepared["causal" if len(given) == 1 else "seq2seq"]

    runs = {
        "summarization/smollm2_lora_docstrings": (prepare, recipe.CAUSAL_ARGUMENTS, [(40, 12)]),
        "summarization/t5_small_docstrings": (prepare, recipe.SEQ2SEQ_ARGUMENTS, [(30, 9)]),
    }
    monkeypatch.setattr(padding, "RUNS", runs)
    padding.main(["--output", str(tmp_path / "padding.json")])
    rows = json.loads((tmp_path / "padding.json").read_text("utf-8"))["rows"]
    assert given == [(40, 12, False), (30, 9, False)]
    assert [row["batches"] for row in rows[:3]] == ["random", "group_by_length", "padding_free"]
    assert all(len(row["all_shares"]) == 3 for row in rows)
    assert len({share["all"] for share in rows[0]["all_shares"]}) > 1  # a seed each
    shares = sorted(1 - share["all"] for share in rows[0]["all_shares"])
    assert rows[2]["tokens / random"] == pytest.approx(shares[1])
    assert rows[2]["all"] == "0.0% (0.0% to 0.0%)"
    assert rows[2]["begin alike"].endswith("%)")
    assert [row["begin alike"] for row in rows].count("") == len(rows) - 1
    assert rows[3]["caps"] == "30, 9"
    assert "group_by_length" in capsys.readouterr().out
