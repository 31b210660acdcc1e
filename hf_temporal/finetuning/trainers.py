"""The trainers of the recipes: ours, with the recipes' model card and scores of generated answers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_temporal.trainer import TemporalWeightSeq2SeqTrainer, TemporalWeightTrainer

from .adapters import adapter_added
from .generation import generate_completions, prompt_of
from .run import CardMixin
from .tasks import Scores


class Seq2SeqTrainer(CardMixin, TemporalWeightSeq2SeqTrainer):
    """The trainer, with the recipe's model card."""


@dataclass(frozen=True)
class Answers:
    """How answers are generated in an evaluation, and what compares them with the labels; one beam is greedy."""

    scores: Scores
    max_new_tokens: int
    num_beams: int


class CausalTrainer(CardMixin, TemporalWeightTrainer):
    """Adds to every evaluation the scores of what is generated from the prompts alone, where `answers` says how."""

    def __init__(self, *args: Any, answers: Answers | None = None, **kwargs: Any) -> None:
        self._answers = answers
        super().__init__(*args, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, and the scores among its metrics.

        Where answers are generated in full precision, a LoRA adapter is added to a copy of the weights for the losses
        too, which changes them by rounding. Under autocast the sum would lose what is small beside a weight.
        """
        if self._answers is None:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        in_full = not self._is_sharded and self.accelerator.mixed_precision == "no"
        with adapter_added(self._root) if in_full else nullcontext():
            output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
            examples: Any = dataloader.dataset
            generated = self._generate([prompt_of(example) for example in examples], self._answers)
        prefix = kwargs.get("metric_key_prefix", "eval")
        scores = self._answers.scores.score(generated, [example["labels"] for example in examples])
        output.metrics.update({f"{prefix}_{name}": value for name, value in scores.items()})
        return output

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    def _generate(self, prompts: list[list[int]], answers: Answers) -> list[list[int]]:
        """Each process generates its share; shares are equally long, as sharded models need."""
        processes, rank = self.args.world_size, self.args.process_index
        padded = prompts + prompts[:1] * (-len(prompts) % processes)
        tokenizer: Any = self.processing_class
        mine = generate_completions(
            self.model,
            tokenizer,
            padded[rank::processes],
            max_new_tokens=answers.max_new_tokens,
            num_beams=answers.num_beams,
            batch_size=self.args.per_device_eval_batch_size,
            synced_gpus=self._is_sharded,
        )
        shares: list[list[list[int]]] = gather_object([mine])
        return [answer for turn in zip(*shares, strict=True) for answer in turn][: len(prompts)]
