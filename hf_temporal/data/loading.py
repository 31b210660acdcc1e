"""Where a task's texts come from: a data set on the Hub, files, or the docstrings of this Python environment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from . import SPLITS
from .docstrings import docstring_files

logger = logging.get_logger(__name__)

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
EMBEDDED_DATA = "docstrings of the installed Python packages"


@dataclass
class DataArguments:
    """Which data set, in the names of Hugging Face's examples; unset: the docstrings of the installed packages."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON (Lines) or Parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for prediction."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Keep only the first so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "The same for prediction."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Read and tokenize the data again."})

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is accepted")
        if self.dataset_name and self.files:
            first = next(f"{split}_file" for split in self.files)
            raise ValueError(f"dataset_name={self.dataset_name!r} and {first} are given: one of them is accepted")
        for split, path in self.files.items():
            if path.suffix not in FILE_TYPES:
                raise ValueError(f"{split}_file={str(path)!r}: {', '.join(FILE_TYPES)} are accepted")
            if not path.is_file() or path.stat().st_size == 0:
                what = "is empty" if path.is_file() else "does not exist"
                raise ValueError(f"{split}_file={str(path)!r} {what}; accepted: a file with at least one example")

    @property
    def files(self) -> dict[str, Path]:
        """The files that are given, by split."""
        named = {split: getattr(self, f"{split}_file") for split in SPLITS}
        return {split: Path(name) for split, name in named.items() if name}

    @property
    def limits(self) -> dict[str, int | None]:
        """How many examples are kept, by split; None: all."""
        return dict(
            zip(SPLITS, (self.max_train_samples, self.max_eval_samples, self.max_predict_samples), strict=True)
        )


@dataclass(frozen=True)
class TaskData:
    """Examples by split, and what a model card has to say about them.

    `sha256` is that of the examples in use, split by split; `provenance` holds the package versions of the embedded
    data.
    """

    splits: dict[str, Any]
    name: str
    sha256: str
    provenance: dict[str, Any] | None = None


def load_splits(arguments: DataArguments) -> tuple[dict[str, Dataset], str, dict[str, Any] | None]:
    """The train, validation and test split that there are, the data's name, and the provenance of the embedded ones.

    Raises ValueError where a split has no example.
    """
    download = "force_redownload" if arguments.overwrite_cache else None
    name, provenance, files = arguments.dataset_name, None, arguments.files
    loaded: DatasetDict = DatasetDict()
    if name is not None:
        loaded = load_dataset(name, arguments.dataset_config_name, download_mode=download)
    elif not files:
        files = docstring_files(overwrite=arguments.overwrite_cache)
        provenance = json.loads(files.pop("provenance").read_text(encoding="utf-8"))
        name = EMBEDDED_DATA
    for split, path in files.items():
        try:
            read = load_dataset(FILE_TYPES[path.suffix], data_files=str(path), download_mode=download)["train"]
            read.data.validate(full=True)  # pyarrow takes JSON in any encoding, and a text fails only when it is read
        except (ValueError, DatasetGenerationError) as error:
            accepted = f"accepted: {path.suffix} in UTF-8 with at least one example"
            reason = f"{split}_file={str(path)!r} gives no examples ({error.__cause__ or error})"
            raise ValueError(f"{reason}; {accepted}") from error
        loaded[split] = read
    splits = {split: loaded[split] for split in SPLITS if split in loaded}
    for split, examples in splits.items():
        if not len(examples):
            raise ValueError(
                f"the {split} split of {name or files[split].name} is empty; accepted: an example or more"
            )
    return splits, name or ", ".join(path.name for path in files.values()), provenance


def check_column(argument: str, column: str, examples: Dataset, split: str) -> None:
    """Raise ValueError, with the columns there are, where `column` is none of them."""
    if column not in examples.column_names:
        accepted = ", ".join(examples.column_names)
        raise ValueError(f"{argument}={column!r} is no column of the {split} data; accepted: {accepted}")


def check_texts(argument: str, column: str, examples: Dataset, split: str) -> None:
    """Raise ValueError where a column holds anything but texts."""
    kind = getattr(examples.features[column], "dtype", examples.features[column])
    if kind not in ("string", "large_string", "null"):
        raise ValueError(f"{argument}={column!r} of the {split} data holds {kind}; accepted: a column of texts")


def named_columns(examples: Dataset, split: str, columns: Mapping[str, str], limit: int | None) -> Dataset:
    """The first `limit` examples that have something in every one of `columns`, under the names that these map to.

    Says how many are left out, and raises ValueError where that is all of them.
    """
    chosen = examples.select_columns([*columns])
    kept = chosen.filter(_is_complete, fn_kwargs={"columns": [*columns]}, desc=f"Looking through the {split} split")
    left_out = len(examples) - len(kept)
    if not len(kept):
        raise ValueError(f"no example of the {split} split has a value in {' and '.join(columns)}")
    if left_out:
        logger.warning(f"{split}: {left_out} of {len(examples)} examples have no {' or no '.join(columns)}; left out.")
    named = kept.rename_columns({column: name for column, name in columns.items() if column != name})
    return named if limit is None else named.select(range(min(limit, len(named))))


def _is_complete(example: Mapping[str, Any], columns: Sequence[str]) -> bool:
    values = [example[column] for column in columns]
    return all(value.strip() if isinstance(value, str) else value for value in values)


def sha256_of(splits: Mapping[str, Dataset]) -> str:
    """Of every split's name and every example's values, in the order of the columns."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for batch in examples.iter(batch_size=1000):  # rows by themselves take three times as long
            for values in zip(*batch.values(), strict=True):
                digest.update(json.dumps([split, *values]).encode())
    return digest.hexdigest()
