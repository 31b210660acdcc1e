"""Where a task's texts come from: a data set on the Hub, files, or the docstrings of this Python environment."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from . import SPLITS, argument, check_counts
from .docstrings import docstring_files

logger = logging.get_logger(__name__)

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
ROW = "temporal_row"  # the number of an example in its file
HEAD = 200  # examples of a stream that are looked at beforehand
EMBEDDED_DATA = "docstrings of the installed Python packages"


@dataclass
class DataArguments:
    """Which data set, in the names of Hugging Face's examples; unset: the docstrings of the installed packages."""

    dataset_name: str | None = argument(None, "Data set on the Hub, or a folder, of save_to_disk too.")
    dataset_config_name: str | None = argument(None, "Configuration of the data set.")
    train_file: str | None = argument(None, "CSV, JSON (Lines), Parquet or Arrow file.")
    validation_file: str | None = argument(None, "The same for evaluation.")
    test_file: str | None = argument(None, "The same for prediction.")
    streaming: bool = argument(False, "Read the train examples while training, in their order; needs max_steps.")
    max_train_samples: int | None = argument(None, "Keep only the first so many examples.")
    max_eval_samples: int | None = argument(None, "The same for evaluation.")
    max_predict_samples: int | None = argument(None, "The same for prediction.")
    preprocessing_num_workers: int | None = argument(None, "Processes that tokenize.")

    def __post_init__(self) -> None:
        names = ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers")
        check_counts(**{name: getattr(self, name) for name in names})
        if self.streaming and not (self.dataset_name or self.train_file):
            raise ValueError(
                "streaming=True without dataset_name or train_file; accepted: one of them, or no streaming."
            )
        for split, path in self.files.items():
            given = f"{split}_file={str(path)!r}"
            if self.dataset_name:
                raise ValueError(f"dataset_name={self.dataset_name!r} and {given}; accepted: one of them.")
            if path.suffix not in FILE_TYPES:
                raise ValueError(f"{given}; accepted: a file of type {', '.join(FILE_TYPES)}.")
            if not path.is_file() or path.stat().st_size == 0:
                what = "is empty" if path.is_file() else "does not exist"
                raise ValueError(f"{given} {what}; accepted: a file with at least one example.")

    @property
    def files(self) -> dict[str, Path]:
        """The files that are given, by split."""
        return {split: Path(name) for split in SPLITS if (name := getattr(self, f"{split}_file"))}

    @property
    def limits(self) -> dict[str, int | None]:
        """How many examples are kept, by split; None: all."""
        return {"train": self.max_train_samples, "validation": self.max_eval_samples, "test": self.max_predict_samples}


@dataclass(frozen=True)
class TaskData:
    """The examples in use by split, and what a model card says about them."""

    splits: dict[str, Any]
    name: str
    sha256: str  # of the splits' names and the examples' values
    provenance: dict[str, Any] | None = None  # the versions of the packages that the embedded data are from
    rows: dict[str, list[int]] = field(default_factory=dict)  # of a split of which rows are left out, those that stay


def load_columns(
    arguments: DataArguments,
    choose: Callable[[dict[str, Dataset], str, bool], Mapping[str, str]],
    *,
    optional: Collection[str] = (),
) -> TaskData:
    """Load of every split the columns that a task needs, cut to its `max_…_samples`.

    `choose` maps all splits, the name of one, and whether the data are the embedded ones, to the columns of that
    split, each with the name that the task has for it. Examples with nothing in one of them that is not among the
    `optional` ones are left out, and told.
    """
    splits, name, provenance = _load_splits(arguments)
    seen = {split: head_of(examples) for split, examples in splits.items()}
    chosen: dict[str, Any] = {}
    rows: dict[str, list[int]] = {}
    digest = hashlib.sha256()
    for split, examples in splits.items():
        columns = choose(seen, split, provenance is not None)
        needed = [column for column, name in columns.items() if name not in optional]
        if isinstance(examples, IterableDataset):
            chosen[split] = _stream_of_columns(examples, columns, needed, arguments.limits[split])
        else:
            chosen[split], left = _named_columns(examples, split, columns, needed, arguments.limits[split])
            rows |= {split: left} if left else {}
        for batch in head_of(chosen[split]).iter(batch_size=1000):  # faster than row by row
            for values in zip(*batch.values(), strict=True):
                digest.update(json.dumps([split, *values]).encode())
    return TaskData(chosen, name, digest.hexdigest(), provenance, rows)


_heads: WeakKeyDictionary[IterableDataset, Dataset] = WeakKeyDictionary()  # so that a stream is begun once


def head_of(examples: Any) -> Dataset:
    """The first examples of a stream, from which its columns are told; any other data set as it is."""
    if not isinstance(examples, IterableDataset):
        return examples
    if examples in _heads:
        return _heads[examples]
    first = [*examples.take(HEAD)]
    if not first:
        raise ValueError("the stream of the train data has no example; accepted: at least one.")
    mixed = "on_mixed_types" in inspect.signature(Dataset.from_list).parameters  # contents of texts and of parts
    _heads[examples] = Dataset.from_list(first, **{"on_mixed_types": "use_json"} if mixed else {})
    return _heads[examples]


def _load_splits(arguments: DataArguments) -> tuple[dict[str, Any], str, dict[str, Any] | None]:
    """The train, validation and test split that there are, the data's name, and the provenance of embedded ones."""
    name, provenance, files = arguments.dataset_name, None, arguments.files
    loaded: DatasetDict = DatasetDict()
    if name is not None:
        config = arguments.dataset_config_name
        try:
            saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
            how = _reading(next(Path(name).rglob("*.csv"), Path())) if Path(name).is_dir() else {}
            loaded = (
                load_from_disk(name) if saved else load_dataset(name, config, streaming=arguments.streaming, **how)
            )
            loaded = DatasetDict(train=loaded) if isinstance(loaded, Dataset) else loaded
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            given = f"dataset_name={name!r} with dataset_config_name={config!r} cannot be loaded: {reason}"
            accepted = "a folder, or the id of a data set on the Hub and one of its configurations"
            raise ValueError(f"{given}; accepted: {accepted}") from error
    elif not files:
        files = docstring_files()
        provenance = json.loads(files.pop("provenance").read_text(encoding="utf-8"))
        name = EMBEDDED_DATA
    for split, path in files.items():
        try:
            how = {"streaming": arguments.streaming and split == "train", **_reading(path)}
            read = load_dataset(FILE_TYPES[path.suffix], data_files=str(path), **how)["train"]
            if isinstance(read, Dataset):
                read.data.validate(full=True)  # pyarrow takes JSON in any encoding, and a text fails when it is read
        except (ValueError, DatasetGenerationError) as error:
            given = f"{split}_file={str(path)!r} gives no examples ({error.__cause__ or error})"
            raise ValueError(f"{given}; accepted: {path.suffix} in UTF-8 with at least one example.") from error
        loaded[split] = read
    splits: dict[str, Any] = {split: loaded[split] for split in SPLITS if split in loaded}
    for split, examples in splits.items():
        if split != "train" and isinstance(examples, IterableDataset):
            limit = arguments.limits[split]
            splits[split] = Dataset.from_list([*(examples if limit is None else examples.take(limit))])
        elif arguments.streaming and split == "train" and isinstance(examples, Dataset):
            splits[split] = examples.to_iterable_dataset()
    return splits, name or ", ".join(path.name for path in files.values()), provenance


def _reading(path: Path) -> dict[str, Any]:
    """How a file is read: the cells of a CSV file are texts as they stand there, "None" and "007" too."""
    if path.suffix != ".csv":
        return {}
    first = load_dataset("csv", data_files=str(path), nrows=1, streaming=True)["train"]
    features = Features({column: Value("string") for row in first for column in row})
    return {"keep_default_na": False, "na_values": [""], "features": features or None}


def check_column(argument: str, column: str, examples: Dataset, split: str, *, holds_texts: bool = True) -> None:
    """Check that a split has a column, and, under `holds_texts`, that it holds texts."""
    given = f"{argument}={column!r}"
    if column not in examples.column_names:
        raise ValueError(f"{given} is no column of the {split} data; accepted: {', '.join(examples.column_names)}.")
    kind = getattr(examples.features[column], "dtype", examples.features[column])
    if holds_texts and kind not in ("string", "large_string", "null"):
        raise ValueError(f"{given} of the {split} data holds {kind}; accepted: a column of texts.")


def _named_columns(
    examples: Dataset, split: str, columns: Mapping[str, str], needed: Sequence[str], limit: int | None
) -> tuple[Dataset, list[int]]:
    """The first `limit` examples that have something in every needed column, with the columns renamed.

    With them come the numbers of their rows, where any was left out, and else none.
    """
    numbered = examples.select_columns([*columns]).add_column(ROW, range(len(examples)))
    kept = numbered.filter(_is_complete, fn_kwargs={"columns": needed}, desc=f"Looking through the {split} split")
    if not len(kept):
        names = " and ".join(needed)
        raise ValueError(f"no example of the {split} split has a value in {names}; accepted: at least one.")
    rows: list[int] = []
    if left_out := len(examples) - len(kept):
        logger.warning(f"{split}: {left_out} of {len(examples)} examples have no {' or no '.join(needed)}; left out.")
        rows = kept[ROW][:]
    named = kept.remove_columns(ROW).rename_columns(
        {column: name for column, name in columns.items() if column != name}
    )
    return named if limit is None else named.select(range(min(limit, len(named)))), rows


def _stream_of_columns(
    examples: IterableDataset, columns: Mapping[str, str], needed: Sequence[str], limit: int | None
) -> IterableDataset:
    """The stream of the same, with the number of each row in the column `ROW`."""
    numbered = examples.select_columns([*columns]).map(_numbered, with_indices=True)
    kept = numbered.filter(_is_complete, fn_kwargs={"columns": needed, "told": True})
    named = kept.rename_columns({column: name for column, name in columns.items() if column != name})
    return named if limit is None else named.take(limit)


def _numbered(example: dict[str, Any], row: int) -> dict[str, Any]:
    return {**example, ROW: row}


def _is_complete(example: Mapping[str, Any], columns: Sequence[str], told: bool = False) -> bool:
    values = [example[column] for column in columns]
    complete = all(value.strip() if isinstance(value, str) else value for value in values)
    if told and not complete:
        logger.warning_once(f"Examples of the stream without {' or without '.join(columns)} are left out.")
    return complete
