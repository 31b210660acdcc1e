"""Pushes to the Hub: uploaded is a copy of what belongs there, without tokens and paths of this machine."""

import contextlib
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, run_as_future, upload_folder
from huggingface_hub.constants import REPOCARD_NAME as CARD_NAME
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from hf_temporal import _transformers
from hf_temporal._peft import adapter_names
from hf_temporal.evaluation import PROFILE_NAME
from hf_temporal.weighting import WEIGHTING_NAME

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


class HubMixin(_transformers.TrainerBase):
    """Put in front of a `Trainer`, makes its pushes to the Hub carry the model's card, and no path of this machine.

    It uploads the model or adapter, tokenizer, card, `temporal_weighting.json`, `loss_by_position.json`, the pictures
    in `output_dir` and the checkpoints that `hub_strategy` names, but neither `training_args.bin` nor logs. In the
    copy that is uploaded, paths are cut down to their last component.
    """

    _is_handed_over = False  # to the trainer's own push: model and card are made already

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir is not None or not self._is_handed_over:
            super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own card with a section on the weighting, and the picture of the loss by position."""
        if self._is_handed_over:
            return
        given = inspect.signature(super().create_model_card).bind_partial(*args, **kwargs).arguments
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        from . import model_card

        run = model_card.TrainingRun.of(
            self,
            base_model=given.get("finetuned_from"),
            license=given.get("license"),
            dataset=next(iter(_listed(given.get("dataset"))), None),
            task=next(iter(_listed(given.get("tasks"))), None),
            picture=model_card.draw_loss_by_position(str(self.args.output_dir)),
        )
        model_card.add_temporal_section(str(self.args.output_dir), run)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and its card in `output_dir` and upload a copy, with the arguments of `Trainer.push_to_hub`.

        A trainer behind this mixin with a `push_to_hub` of its own uploads the copy itself: while that runs,
        `args.output_dir` is the folder of the copy. `Trainer.push_to_hub` is replaced, since it can neither delete an
        adapter that a whole model takes the place of, nor say what to run again after an upload that failed, as the
        `RuntimeError` here does. `finetuned_from` names a base model that was loaded from a folder.

        Returns:
            The commit, or its `Future` where `blocking` is False; None on all processes but the first.
        """
        own = super().push_to_hub
        is_own = getattr(own, "__func__", None) is not Trainer.push_to_hub
        if not is_own:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            tags = [*_listed(kwargs.pop("tags", None)), *_listed(getattr(self.model, "model_tags", None))]
            kwargs |= {"tags": list(dict.fromkeys(tags))} if tags else {}
            kwargs.setdefault("model_name", self._repository_name)
            self.create_model_card(**kwargs)
        if is_own:
            kwargs |= {} if private is None else {"private": private}
            push = functools.partial(own, commit_message, blocking, token, revision, **kwargs)
            return self._hand_over(push, base_model=kwargs.get("finetuned_from"))
        if not self.is_world_process_zero():
            return None
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            with _what_to_run_again(self._repository_name, str(commit_message), str(self.args.output_dir)):
                _transformers.init_hub_repository(self, token=token, private=private)
        _transformers.wait_for_pushes(self)
        pushes = _transformers.pushes_in_progress(self)
        if failed := [push for push in pushes if push.exception() is not None]:
            logger.warning(
                f"{len(failed)} of {len(pushes)} pushes during training failed; what they would have sent of "
                f"checkpoints is not on the Hub. The last error: {failed[-1].exception()}"
            )
        _transformers.set_pushes_in_progress(self, [])
        return self._upload(
            Path(str(self.args.output_dir)),
            base_model=kwargs.get("finetuned_from"),
            blocking=blocking,
            commit_message=commit_message,
            token=token,
            revision=revision if revision is not None else self.args.hub_revision,
        )

    def _hand_over(self, push: Callable[[], Any], base_model: str | None) -> Any:
        """Call the trainer's own push, which takes a copy of `output_dir` for `output_dir`."""
        output_dir = str(self.args.output_dir)
        self._is_handed_over = True
        try:
            if not self.is_world_process_zero():
                return push()
            staging = self._staged(Path(output_dir), base_model)
            self.args.output_dir = str(Path(staging.name) / self._repository_name)
            pushed = push()
        finally:
            self.args.output_dir, self._is_handed_over = output_dir, False
        if isinstance(pushed, Future):
            pushed.add_done_callback(lambda _: staging.cleanup())
        else:
            staging.cleanup()
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint in the background, as `hub_strategy` says; where that fails, training goes on."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        pushes = _transformers.pushes_in_progress(self)
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
        _transformers.set_pushes_in_progress(self, [*pushes, push])

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
        staging = self._staged(source, base_model, checkpoint_name)
        upload |= {"repo_id": self.hub_model_id, "folder_path": Path(staging.name) / self._repository_name}
        if not adapter_names(self.model):
            upload["delete_patterns"] = ADAPTER_FILES  # from_pretrained would put an adapter there on the whole model
        send = functools.partial(_send, staging, str(self.args.output_dir), **upload)
        return send() if blocking else run_as_future(send)

    def _staged(
        self, source: Path, base_model: str | None, checkpoint_name: str | None = None
    ) -> tempfile.TemporaryDirectory[str]:
        """A folder that holds one named as the repository, with public copies of what is to be uploaded."""
        from .model_card import TrainingRun, add_temporal_section
        from .privacy import PublicCopies

        output_dir, run = Path(str(self.args.output_dir)), TrainingRun.of(self)
        copies = PublicCopies(run.base_model, base_model)
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
        for adapter in adapter_names(self.model):
            copies.make(source / adapter, folder / adapter, MODEL_FILES)
        if source != output_dir:
            copies.make(source, folder, [] if (folder / CARD_NAME).exists() else [CARD_NAME])
            add_temporal_section(folder, run)
        if checkpoint_name is not None:
            for each in [source, *(path for path in source.rglob("*") if path.is_dir())]:
                copies.make(each, folder / checkpoint_name / each.relative_to(source), ["*"])
        return staging


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


def _listed(names: str | list[str] | None) -> list[str]:
    """Names of the metadata, which may be one, several or none."""
    return [names] if isinstance(names, str) else names or []
