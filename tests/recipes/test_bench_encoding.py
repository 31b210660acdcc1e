"""The benchmark of encoding runs at the size of a toy, and writes what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import encoding
import pytest
from transformers import PreTrainedTokenizerFast

from hf_temporal.finetuning.models import ModelArguments
from tests.tiny_summarization import tiny_tokenizer

pytest.importorskip("trl", minversion="1.16")


def test_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: ModelArguments, __: None) -> tuple[None, PreTrainedTokenizerFast]:
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        return None, tokenizer

    monkeypatch.setattr(encoding, "load_causal_lm", load)
    output = tmp_path / "results.json"
    encoding.main(["--conversations", "20", "--repeats", "2", "--output", str(output)])
    results = json.loads(output.read_text(encoding="utf-8"))
    assert [row["what"] for row in results["rows"]] == ["TRL's SFTTrainer", "ours"]
    assert results["rows"][0]["rate"] == 1.0
    assert all(len(row["all_seconds"]) == 2 for row in results["rows"])
    assert min(results["rows"][1]["all_seconds"]) > 0
    assert "conversations a second" in capsys.readouterr().out
