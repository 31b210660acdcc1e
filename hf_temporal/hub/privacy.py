"""What leaves this machine: texts, and copies of files, without tokens and without its paths."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME as CARD_NAME

from hf_temporal.weighting import WEIGHTING_NAME

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}(?:/[\w-][\w.-]{0,95})?")
_TOKEN_ARGUMENT = re.compile(r"((?:--(?:\w*(?:hub|auth|access)\w*_)?token|--\w*api_key)(?:=|\s+)|\w*TOKEN=)\S+")
# two components or more, so that a lone /word of prose stays, and one behind ~; no URL, no closing tag; backslashes
# only behind a drive or in a pair, and not those of an escape sequence such as \n
_NAME = r"[^\s\"'`()\[\],;|<>/\\]+"
_LOCAL_PATH = re.compile(
    rf"(?:\bfile://|\b[A-Za-z]:|~|(?<![\w.~/<-]))(?:/(?!/){_NAME}){{2,}}/?|(?<!\w)~/{_NAME}"
    rf"|(?:\b[A-Za-z]:(?!\\[nrt](?![a-z]))|(?<![\w.\\])\\)(?:\\{_NAME}){{2,}}\\?"
)
_QUOTED_PATH = re.compile(r"(['\"](?:--?[\w-]+=)?)~?(?:/(?!/)[^\n'\"`/\\]+){2,}/?(?=['\"])")

# vocabularies hold what looks like a path and is none
FILES_WITH_PATHS = ("*config.json", "trainer_state.json", WEIGHTING_NAME)
KEPT_AT_HOME = "training_args.bin"  # holds the token


def is_local_path(text: str) -> bool:
    """Whether a whole text is the path of something on this machine, or absolute and of two components or more."""
    if "\n" in text or not {"/", "\\"} & set(text):
        return False
    if re.match(r"/|[A-Za-z]:[/\\]", text):
        return len(re.split(r"[/\\]+", text.strip("/\\"))) > 1
    return text.startswith(("~/", "file://", r"\\")) or os.path.exists(text)  # noqa: PTH110  Path raises on a long text


def hub_id(name: str | None) -> str | None:
    """The name if it can be one of the Hub's; None for a path, or the name of a file or folder on this machine."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def last_component(path: str) -> str:
    """The part of a path after its last slash or backslash."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def without_tokens(text: str) -> str:
    """The text with `<token>` in place of every token, and ~ in place of the home folder."""
    text = _TOKEN.sub("<token>", _TOKEN_ARGUMENT.sub(r"\1<token>", text))
    home = str(Path.home())
    return text.replace(home, "~") if len(Path(home).parts) > 1 else text


def without_private(text: str, *, folder: str = "") -> str:
    """`without_tokens`, and with `folder` in place of the folder of every absolute path."""
    text = _QUOTED_PATH.sub(lambda found: found[1] + folder + last_component(found[0]), without_tokens(text))
    return _LOCAL_PATH.sub(lambda found: folder + last_component(found[0]), text)


def public_card(content: str, base_model: str | None = None) -> str:
    """The card without tokens and without paths of this machine.

    An absolute path becomes `path/to/` and its last component, in the metadata that component alone. A base model
    recorded by its folder becomes `base_model` if that is a Hub id; otherwise only the text keeps the folder's name.
    """
    card = ModelCard(content)
    data = cast("ModelCardData", card.data)
    recorded = data.base_model if isinstance(data.base_model, str) else None
    known = hub_id(base_model)
    if recorded and hub_id(recorded) is None:
        data.tags = [
            tag.replace(recorded, known) if known else tag for tag in data.tags or [] if known or recorded not in tag
        ]
        card.text = card.text.replace(recorded, known or last_component(recorded))
        data.base_model = None
    data.base_model = known or data.base_model
    data.tags = sorted({tag for tag in data.tags or [] if without_private(tag) == tag})
    metadata, between, text = str(card).partition("\n---\n")
    return without_private(metadata) + between + without_private(text, folder="path/to/")


@dataclasses.dataclass(frozen=True)
class PublicCopies:
    """Copies files, with Hub ids or last components in place of the paths of this machine."""

    recorded: str | None = None  # what the base model was loaded from
    base_model: str | None = None  # the Hub id of that, if known

    def make(self, source: Path, target: Path, patterns: Iterable[str]) -> None:
        """Copy the files of a folder that match one of the patterns; those that need no change are linked."""
        patterns = list(patterns)
        for path in sorted(source.iterdir()) if source.is_dir() else []:
            if path.is_file() and path.name != KEPT_AT_HOME and any(fnmatch(path.name, each) for each in patterns):
                target.mkdir(parents=True, exist_ok=True)
                self._copy(path, target / path.name)

    def _copy(self, source: Path, target: Path) -> None:
        if source.name == CARD_NAME:
            target.write_text(public_card(source.read_text(encoding="utf-8"), self.base_model), encoding="utf-8")
            return
        if any(fnmatch(source.name, each) for each in FILES_WITH_PATHS):
            content = json.loads(source.read_text(encoding="utf-8"))
            # what looks like a path inside of a longer text may belong to a token or a chat template
            clean = without_tokens if source.name.startswith("tokenizer") else without_private
            if (public := self.public(content, clean)) != content:
                target.write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                return
        if source != target:
            try:
                target.hardlink_to(source)
            except OSError:
                shutil.copyfile(source, target)

    def public(self, value: Any, clean: Callable[[str], str] = without_private) -> Any:
        """A JSON value without paths of this machine, at any depth; `clean` is for texts that are more than a path."""
        if isinstance(value, dict):
            return {key: self.public(each, clean) for key, each in value.items()}
        if isinstance(value, list):
            return [self.public(each, clean) for each in value]
        if not isinstance(value, str):
            return value
        if not is_local_path(value):
            return clean(value)
        if self.base_model and value == self.recorded:
            return self.base_model
        return last_component(value)
