"""YAML and data files as they come: arguments and examples that can be used, or an error that says what is wrong."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, get_type_hints

import datasets
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_temporal.data import language_modeling, summarization
from hf_temporal.data.language_modeling import LanguageModelingArguments, load_texts
from hf_temporal.data.loading import DataArguments
from hf_temporal.data.summarization import SummarizationArguments, load_pairs
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS as KINDS
from hf_temporal.positions import IGNORE_INDEX
from hf_temporal.training_args import TemporalFields
from tests.tiny_summarization import tiny_tokenizer

OWN = [each.name for kind in (*KINDS[:-1], TemporalFields) for each in dataclasses.fields(kind)]
TEMPORAL = ("temporal_power", "temporal_mixture", "temporal_power_start", "temporal_power_warmup_ratio")
STOCK = [
    *("output_dir", "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "warmup_steps"),
    *("eval_strategy", "save_strategy", "lr_scheduler_type", "optim", "seed", "label_smoothing_factor"),
    *("gradient_accumulation_steps", "label_names", "report_to", "weight_decay", "do_train"),
]
NAMES = {each.name for kind in KINDS for each in dataclasses.fields(kind)}
CASES = settings().max_examples  # of the profile in force: see tests/conftest.py
WORDS = st.text(max_size=8) | st.sampled_from(["1", "-1", "1e-3", "true", "inf", "nan", "--seed", "=", "no", "linear"])
SINGLE = (
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats() | WORDS | st.dates() | st.binary()
)
KEYS = st.integers() | st.none() | st.dates() | st.text(max_size=12).filter(lambda key: key not in NAMES)
VALUES = (
    SINGLE | st.lists(SINGLE, max_size=2) | st.dictionaries(WORDS, SINGLE, max_size=2) | st.sets(WORDS, max_size=2)
)


# ---- configurations


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """TrainingArguments speak to accelerate through environment variables."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def outcome(content: bytes) -> tuple[dict[str, Any] | None, str]:
    """The arguments by name, or what was said against them."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, environment_kept(), contextlib.redirect_stderr(said):
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        try:
            parsed = parse(KINDS, ["--config", str(path), "--use_cpu", "true"])
        except (ValueError, TypeError) as error:
            return None, str(error)
        except SystemExit:
            return None, said.getvalue()
    return {name: value for each in parsed for name, value in vars(each).items()}, ""


@settings(max_examples=2 * CASES)
@given(st.dictionaries(st.sampled_from(OWN) | st.sampled_from(STOCK), VALUES, min_size=1, max_size=3))
def test_settings_are_taken_or_named(chosen: dict[str, Any]) -> None:
    arguments, said = outcome(yaml.safe_dump(chosen).encode())
    if arguments is None:
        assert any(name in said.lower() for name in chosen), said
        return
    hints = {name: hint for kind in KINDS for name, hint in get_type_hints(kind).items()}
    for name, value in chosen.items():
        if hints[name] in (int, bool, str):
            assert type(arguments[name]) is hints[name]
        if name not in OWN:
            continue
        if hints[name] is int or name in TEMPORAL:
            assert not math.isnan(arguments[name])
            assert arguments[name] == pytest.approx(float(value))
        if value is None:
            assert arguments[name] is None
        if isinstance(value, str) and hints[name] in (str, str | None):
            assert arguments[name] == value
        if isinstance(value, date) and hints[name] in (str, str | None):
            assert arguments[name] == str(value)


@settings(max_examples=CASES)
@given(st.dictionaries(KEYS, SINGLE, min_size=1, max_size=2))
def test_unknown_keys_are_named(chosen: dict[Any, Any]) -> None:
    arguments, said = outcome(yaml.safe_dump(chosen).encode())
    assert arguments is None
    assert any(f"{key!r} is no argument of this recipe; the nearest is" in said for key in chosen)


@settings(max_examples=CASES)
@given(
    st.binary(max_size=40)
    | st.text(alphabet="ab:- \n[]{}'\"!&*#|>%@`,?\t0", max_size=40).map(str.encode)
    | st.sampled_from(["date: 2024-13-45", "a: !!int ''", "a: !!timestamp b", "a: !!bool b", "a: &a [*a]", "[" * 3000,
                       "? [a, b]\n: c", "a: !!python/name:os.system", "\ufeff- a", "a: b: c"]).map(str.encode)
)  # fmt: skip
def test_files_that_are_no_settings_are_refused(content: bytes) -> None:
    arguments, said = outcome(content)
    if arguments is not None:
        assert yaml.safe_load(content) == {}
        return
    assert "config.yaml" in said
    assert "accepted: " in said or "the nearest is" in said


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looked at .*/none\.yaml; accepted: a YAML file, or .*copying/small"):
        parse(KINDS, ["--config", os.path.relpath(tmp_path / "none.yaml")])


# ---- data


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    kept = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = kept


COLUMNS = ("article", "highlights", "text", "messages", "prompt", "completion", "", "a b", "0")
TEXTS = st.text(max_size=12) | st.sampled_from(["", " ", "NaN", "None", "1", 'a "b", c', "a\nb", "x" * 300])
CELLS = (
    TEXTS | st.none() | st.integers(-9, 9) | st.floats() | st.booleans() | st.lists(TEXTS, max_size=2)
    | st.dictionaries(st.sampled_from(["role", "content"]), TEXTS)
    | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}), max_size=3)
)  # fmt: skip


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes, list[dict[str, Any]] | None]:
    """A suffix, the content, and the rows where they are texts alone in a sound JSON Lines file."""
    names = draw(st.lists(st.sampled_from(COLUMNS), max_size=3, unique=True))
    only_texts = draw(st.booleans())
    cells = TEXTS if only_texts else CELLS
    rows = draw(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(names, cells)), max_size=4))
    kind = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv"]))
    if kind == ".csv":
        stream = io.StringIO()
        csv.writer(stream).writerows([names, *(list(row.values()) for row in rows)])
        text = stream.getvalue()
    else:
        text = json.dumps(rows) if kind == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-8-sig"])), "surrogatepass")
    broken = draw(st.sampled_from([b"", b"", b"", b"\xff\xfe", b"\x00", b'{"article": ', b"\n\n", b"]", b'"']))
    at = draw(st.integers(0, len(content)))
    sound = only_texts and kind == ".jsonl" and not broken and content == text.encode("utf-8", "surrogatepass")
    return kind, content[:at] + broken + content[at:], rows if sound else None


BLANK = [{"article": "a", "highlights": " "}, {"article": "b", "highlights": "c"}]


@settings(max_examples=max(CASES // 3, 1))
@example((".jsonl", "".join(json.dumps(row) + "\n" for row in BLANK).encode(), BLANK), "article", "highlights")
@given(files(), st.sampled_from([None, "article", "text", "gone"]), st.sampled_from([None, "highlights", "article"]))
def test_files_give_examples_or_a_reason(
    given_file: tuple[str, bytes, list[dict[str, Any]] | None], text_column: str | None, summary_column: str | None
) -> None:
    kind, content, rows = given_file
    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"train{kind}"
        path.write_bytes(content)
        columns = SummarizationArguments(text_column=text_column, summary_column=summary_column)
        with saying(f"train_file='{path}'", "_column=", "the train", "text_column and summary_column"):
            pairs = load_pairs(DataArguments(train_file=str(path)), columns).splits["train"][:]
            assert pairs["text"]
            assert all(text.strip() and short.strip() for text, short in zip(*pairs.values(), strict=True))
            if rows is not None and text_column and summary_column:
                both = [(row.get(text_column), row.get(summary_column)) for row in rows]
                assert [*zip(*pairs.values(), strict=True)] == [
                    (text, short) for text, short in both if text and short and text.strip() and short.strip()
                ]
            learnable(summarization.encode_pairs_for_causal_lm(pairs, tokenizer, columns))
        with saying(f"train_file='{path}'", "column=", "the train", "the data have the columns", "messages"):
            texts = load_texts(DataArguments(train_file=str(path)), text_column).splits["train"][:]
            learnable(language_modeling.encode_for_causal_lm(texts, tokenizer, LanguageModelingArguments()))


@contextlib.contextmanager
def saying(*reasons: str) -> Iterator[None]:
    """A ValueError, if any, gives one of these reasons."""
    try:
        yield
    except ValueError as error:
        if not any(reason in str(error) for reason in reasons):
            raise AssertionError(f"{error} is none of ours") from error


def learnable(encoded: dict[str, list[list[int]]]) -> None:
    for ids, mask, labels in zip(*encoded.values(), strict=True):
        assert len(ids) == len(mask) == len(labels)
        assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_files_in_another_encoding_are_refused_by_name(suffix: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"train{suffix}"
    content = {".jsonl": '{"text": "café"}\n', ".json": '[{"text": "café"}]', ".csv": "text\ncafé\n"}[suffix]
    path.write_bytes(content.encode(encoding))
    with pytest.raises(ValueError, match=r"gives no examples \(.*\); accepted: .* in UTF-8") as raised:
        load_texts(DataArguments(train_file=str(path)), "text")
    assert f"train_file='{path}'" in str(raised.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": 3, "completion": "a"},
            "column='prompt' of the train data holds int64; accepted: a column of texts",
        ),
        ({"text": [1, 2]}, "column='text' of the train data holds .*; accepted: a column of texts"),
        ({"messages": "hello"}, "messages hold 'hello'; accepted: a list of mappings with role and content"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "messages hold .* chat template makes nothing"),
    ],
)
def test_texts_that_are_none(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        language_modeling.encode_for_causal_lm(
            load_texts(DataArguments(train_file=str(path))).splits["train"][:], tiny_tokenizer(),
            LanguageModelingArguments(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_source_length": None}, "max_source_length=None; accepted: int"),
        ({"task": ["copying"]}, r"task=\['copying'\]; accepted: str"),
        ({"temporal_power": {"p": 1}}, r"temporal_power=\{'p': 1\}; accepted: float"),
        ({"lora_target_modules": ["q_proj", 3]}, r"lora_target_modules=\['q_proj', 3\]; accepted: "),
        ({"output_dir": b"a"}, r"output_dir=b'a'; accepted: "),
    ],
)
def test_values_that_are_no_single_ones(setting: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(setting), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse(KINDS, ["--config", str(path)])
