"""Pushes to the Hub: a copy of what belongs there, in which nothing tells of this machine, is what is uploaded."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, run_as_future, upload_folder
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from hf_temporal._peft import adapter_names
from hf_temporal._transformers import (
    init_hub_repository,
    pushes_in_progress,
    set_pushes_in_progress,
    wait_for_pushes,
)
from hf_temporal.evaluation import PROFILE_NAME
from hf_temporal.weighting import WEIGHTING_NAME

from .model_card import TrainingRun, add_temporal_section, draw_loss_by_position, listed
from .privacy import CARD_NAME, PublicCopies

logger = logging.get_logger(__name__)

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.bin",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "*.py",
    WEIGHTING_NAME,
)
ADAPTER_FILES = ["adapter_config.json", "adapter_model.*"]
OUTPUT_FILES = (CARD_NAME, PROFILE_NAME, "*.png", "*.svg")

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class HubMixin(_Trainer):
    """Put in front of a `Trainer`, its pushes to the Hub carry the model's card and nothing of this machine.

    Uploaded are the model or adapter, tokenizer, card, `temporal_weighting.json`, `loss_by_position.json` and the
    pictures in `output_dir`, and what `hub_strategy` says of checkpoints. `training_args.bin` and logs are not; paths
    in the others are cut down to their last component, in the copy that is uploaded.
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own card with a section on the weighting, and the picture of the loss by position."""
        given = inspect.signature(super().create_model_card).bind_partial(*args, **kwargs).arguments
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        run = TrainingRun.of(self)
        run = dataclasses.replace(
            run,
            base_model=given.get("finetuned_from") or run.base_model,
            license=given.get("license"),
            dataset=_first(given.get("dataset")),
            task=_first(given.get("tasks")),
            picture=draw_loss_by_position(str(self.args.output_dir)),
        )
        add_temporal_section(str(self.args.output_dir), run)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and its card in `output_dir` and upload both, with the arguments of `Trainer.push_to_hub`.

        Args:
            commit_message: of the commit.
            blocking: whether to return when all is uploaded, otherwise at once.
            token: overrides `args.hub_token`.
            revision: overrides `args.hub_revision`.
            private: whether a repository made for this is private.
            kwargs: those of `create_model_card`; `finetuned_from` names a base model that was loaded from a folder.

        Returns:
            The commit, or its `Future` where `blocking` is False; None on all processes but the first.

        Raises:
            RuntimeError: the upload broke off; says what to run again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [*listed(kwargs.pop("tags", None)), *listed(getattr(self.model, "model_tags", None))]
        if tags:
            kwargs["tags"] = list(dict.fromkeys(tags))
        kwargs.setdefault("model_name", self._repository_name)
        self.create_model_card(**kwargs)
        if self.hub_model_id is None:
            with _what_to_run_again(self._repository_name, str(commit_message), str(self.args.output_dir)):
                init_hub_repository(self, token=token, private=private)
        wait_for_pushes(self)
        self._warn_of_failed_pushes()
        return self._upload(
            Path(str(self.args.output_dir)),
            base_model=kwargs.get("finetuned_from"),
            blocking=blocking,
            commit_message=commit_message,
            token=token,
            revision=revision if revision is not None else self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint in the background, as `hub_strategy` says; where that fails, training goes on."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        pushes = pushes_in_progress(self)
        if not (self.args.hub_always_push or all(push.done() for push in pushes)):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        push = self._upload(
            Path(checkpoint_folder),
            checkpoint_name=names.get(HubStrategy(self.args.hub_strategy)),
            blocking=False,
            commit_message=f"Training in progress, {when}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
        )
        push.add_done_callback(_warn_of_failure)
        set_pushes_in_progress(self, [*pushes, push])

    def _warn_of_failed_pushes(self) -> None:
        pushes = pushes_in_progress(self)
        failed = [push for push in pushes if push.exception() is not None]
        if failed:
            logger.warning(
                f"{len(failed)} of {len(pushes)} pushes during training failed; what they would have sent of "
                f"checkpoints is not on the Hub. The last error: {failed[-1].exception()}"
            )
        set_pushes_in_progress(self, [])

    @property
    def _repository_name(self) -> str:
        name = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        return str(name).rpartition("/")[2]

    def _upload(
        self,
        source: Path,
        *,
        base_model: str | None = None,
        checkpoint_name: str | None = None,
        blocking: bool,
        **upload: Any,
    ) -> Any:
        """Upload the model in `source` with what else belongs to it, and all of `source` under `checkpoint_name`."""
        output_dir = Path(str(self.args.output_dir))
        copies = PublicCopies(TrainingRun.of(self).base_model, base_model)
        staging = tempfile.TemporaryDirectory(prefix="_hub_", dir=output_dir, ignore_cleanup_errors=True)
        folder = Path(staging.name) / self._repository_name
        folder.mkdir()
        tokenizer = self.processing_class
        if tokenizer is None:
            tokenizer = getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            copies.make(folder, folder, ["*"])
        copies.make(output_dir, folder, OUTPUT_FILES)
        copies.make(source, folder, MODEL_FILES)
        adapters = adapter_names(self.model)
        for adapter in adapters:
            copies.make(source / adapter, folder / adapter, MODEL_FILES)
        if source != output_dir:
            copies.make(source, folder, [] if (folder / CARD_NAME).exists() else [CARD_NAME])
            add_temporal_section(folder, TrainingRun.of(self))
        if checkpoint_name is not None:
            copies.make_all(source, folder / checkpoint_name)
        upload |= {"repo_id": self.hub_model_id, "folder_path": folder}
        if not adapters:
            upload["delete_patterns"] = ADAPTER_FILES  # from_pretrained would put an adapter there on the whole model
        if blocking:
            return _send(staging, str(output_dir), **upload)
        return run_as_future(_send, staging, str(output_dir), **upload)


def _send(staging: tempfile.TemporaryDirectory[str], output_dir: str, **upload: Any) -> CommitInfo:
    with staging, _what_to_run_again(upload["repo_id"], upload["commit_message"], output_dir):
        return upload_folder(**upload)


@contextlib.contextmanager
def _what_to_run_again(repository: str, commit_message: str, output_dir: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = " ← ".join(repr(each) for each in (error, error.__cause__) if each is not None)
        raise RuntimeError(
            f"the push to {repository} ({commit_message}) broke off: {reason}. Nothing is lost, the model is in "
            f"{output_dir}: run trainer.push_to_hub() again, or the same command; files that have arrived are not "
            "sent twice."
        ) from error


def _warn_of_failure(push: Future[CommitInfo]) -> None:
    if push.exception() is not None:
        logger.warning(f"Training goes on, but {push.exception()}")


def _first(names: str | list[str] | None) -> str | None:
    return next(iter(listed(names)), None)
