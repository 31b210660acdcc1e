"""A report, before training, on what each p would do to a model and its data."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_temporal.model.model_loss import undisturbed

from .evaluation import BINS, TokenBatch
from .installed import require
from .positions import document_starts, target_positions
from .tables import markdown
from .trainer import TemporalWeightMixin
from .weighting import TemporalWeighting, document_max, wide_dtype

POWERS = (0.0, 0.5, 1.0, 2.0, 4.0, 10.0)
QUARTERS = 4
# Measured on summaries of some 14 tokens (docs/results.md): with 11, 17 and 26 % of the weight on the end
# token, 0, 13 and 79 % of the texts came out empty.
STOPS_AT_ONCE = 0.15
# Passages of 64 tokens to be repeated, first token's loss 18 times the mean: recall 0.85 at p = 0, 0.26 at p = 1.
WORST_AT_FIRST = 2
HARDLY_TRAINED = 0.1
# Why a p may harm, by the part of the target that it rests on.
WARNINGS = {
    "first token": "The model is worst at the first token, from which all that it generates follows, and every p > 0 "
    "takes weight from there: even p = 1 may harm.",
    "beginning": "The beginning is hardly trained any more: fine where it is known or does not matter; "
    "temporal_mixture=0.9 would keep a tenth of its weight.",
    "last token": "If that token ends the text, expect a model that stops too early, or at once.",
}


@dataclass(frozen=True)
class PowerEffect:
    """What t^p makes of the target tokens; every share is one of Σw over all of them."""

    power: float  # p
    effective_sample_size: float  # (Σw)²/Σw² as a share of the target tokens
    first_token: float  # share of the documents' first target tokens
    last_token: float  # share of their last ones: in a text that ends, the end-of-sequence tokens
    quarters: tuple[float, ...]  # shares of each document's target tokens with (k − 1)/4 < rank/number ≤ k/4
    deciles: tuple[float, ...]  # the same by tenths
    loss: float  # Σwℓ/Σw of the model before training


@dataclass(frozen=True)
class PowerReport:
    """The findings of `suggest_power`; `str` makes a table of them and says in words what it means."""

    documents: int  # how many were read
    lengths: tuple[int, int, int]  # target tokens of a document: fewest, median, most
    first_token_loss: float  # mean loss of the first target tokens, before training
    last_token_loss: float  # of the last ones
    loss_quarters: tuple[float, ...]  # share of each quarter in the sum of all losses
    loss_deciles: tuple[float, ...]  # the same by tenths
    effects: tuple[PowerEffect, ...]  # of each p, in ascending order, p = 0 among them

    @property
    def usual(self) -> PowerEffect:
        return next(effect for effect in self.effects if effect.power == 0)

    def warnings(self, effect: PowerEffect) -> list[str]:
        """The names, in `WARNINGS`, of what `words` warns of at this p."""
        said = {
            "first token": effect.power > 0 and self._worst_at_first,
            "beginning": self._times_usual(effect)[0] < HARDLY_TRAINED,
            "last token": effect.last_token >= STOPS_AT_ONCE,
        }
        return [name for name, is_said in said.items() if is_said and effect.power != 0]

    @property
    def _worst_at_first(self) -> bool:
        return self.first_token_loss > WORST_AT_FIRST * self.usual.loss

    def _times_usual(self, effect: PowerEffect) -> tuple[float, ...]:
        """Of each quarter: its share of the weight, divided by that at p = 0; 1 for a quarter without tokens."""
        shares = zip(effect.quarters, self.usual.quarters, strict=True)
        return tuple(share / usual if usual else 1.0 for share, usual in shares)

    def table(self) -> str:
        """A table in Markdown: the shares of the loss, and below them a row for each p."""
        rows: list[tuple[str, ...]] = [
            ("", "first token", "1st quarter", "2nd", "3rd", "4th", "last token", "effective sample size", "loss"),
            ("share of the loss", "", *(f"{share:.1%}" for share in self.loss_quarters), "", "", ""),
        ]
        for effect in self.effects:
            shares = [f"{share:.1%}" for share in (effect.first_token, *effect.quarters, effect.last_token)]
            size = f"{effect.effective_sample_size:.0%}"
            rows += [(f"weight at p = {effect.power:g}", *shares, size, f"{effect.loss:.3f}")]
        return markdown(rows)

    def words(self) -> list[str]:
        """A sentence or two on the data, and on each p but 0."""
        usual, (fewest, median, most) = self.usual, self.lengths
        lines = [
            f"{self.documents:,} documents of {fewest:,} to {most:,} target tokens (median {median:,}). As it is, the "
            f"model's loss is {self.first_token_loss:.2f} at the first, {self.last_token_loss:.2f} at the last and "
            f"{usual.loss:.2f} on average; {self.loss_quarters[0]:.0%} of all loss lies in the first quarter of the "
            f"targets, {self.loss_quarters[-1]:.0%} in the last."
        ]
        if self._worst_at_first:
            lines[0] += f" {WARNINGS['first token']}"
        for effect in self.effects:
            if effect.power == 0:
                continue
            first, *_, last = self._times_usual(effect)
            line = (
                f"p = {effect.power:g}: the first quarter counts {first:.2g} times as much as usual, the last "
                f"{last:.2g} times; the last token alone has {effect.last_token:.0%} of the weight instead of "
                f"{usual.last_token:.0%}. A batch is worth {effect.effective_sample_size:.0%} of its tokens."
            )
            lines.append(
                " ".join([line, *(WARNINGS[name] for name in self.warnings(effect) if name != "first token")])
            )
        return lines

    def plot(self, path: str | os.PathLike[str], *, title: str = "Where the loss is, and where $t^p$ looks") -> None:
        require("plots")
        from .power_plots import plot_power_report  # only here: matplotlib is slow to import

        weights = {effect.power: effect.deciles for effect in self.effects}
        plot_power_report(self.loss_deciles, weights, Path(path), title=title)

    def __str__(self) -> str:
        return f"{self.table()}\n\n" + "\n".join(f"- {line}" for line in self.words())


def suggest_power(
    trainer: TemporalWeightMixin, dataset: Any = None, *, powers: Sequence[float] = POWERS, max_examples: int = 256
) -> PowerReport:
    """Evaluate the model on a few examples, and report what each p would do to the weights of their tokens.

    Nothing is trained or written, and it takes as long as an evaluation of `max_examples` examples.

    Args:
        trainer: in one process; its model, collator and weighting (origin, normalization, mixture) are used.
        dataset: None for the trainer's training data.
        powers: the p to report on; 0 is added.
        max_examples: how many examples are read, from the first.

    Raises:
        ValueError: several processes, no data, no target token in them, or a p that `TemporalWeighting` refuses.
    """
    owner: Any = trainer
    if owner.args.world_size > 1:
        raise ValueError(f"world_size={owner.args.world_size}; accepted: one process, which is enough for a look.")
    if max_examples < 1:
        raise ValueError(f"max_examples={max_examples!r}; accepted: a whole number of at least 1.")
    data = owner.train_dataset if dataset is None else dataset
    if data is None:
        raise ValueError("dataset=None, and the trainer has no train_dataset; accepted: one of them.")
    weightings = [trainer.weighting.at(power) for power in sorted({0.0, *powers})]
    tokens = _Tokens()
    loader = owner.get_test_dataloader(list(islice(data, max_examples)))
    with undisturbed(owner.model), owner._observing(tokens.add):
        for batch in tqdm(loader, "Looking at the data", leave=False):
            owner.prediction_step(owner.model, batch, True)
    return tokens.report(weightings)


class _Tokens:
    """The target tokens of all batches, one after the other."""

    def __init__(self) -> None:
        self._columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._documents = 0

    def add(self, batch: TokenBatch) -> None:
        losses, _, positions, document_ids, loss_weights = batch
        target = positions > 0
        starts = document_starts(target, document_ids)
        documents = (starts.flatten().cumsum(0) - 1 + self._documents).view(starts.shape)
        self._documents += int(starts.sum())
        own = torch.ones_like(losses) if loss_weights is None else loss_weights.to(losses)
        self._columns.append((positions[target], documents[target], losses[target], own[target]))

    def report(self, weightings: Sequence[TemporalWeighting]) -> PowerReport:
        positions, documents, losses, own = (torch.cat(column).cpu() for column in zip(*self._columns, strict=True))
        if not len(positions):
            raise ValueError("dataset: no target token in what was looked at; accepted: labels other than -100.")
        ranks = target_positions(torch.zeros_like(documents)[None], document_ids=documents[None])
        numbers = document_max(ranks, documents[None]).expand_as(ranks)[0]
        rank = ranks[0]

        def shares(values: Tensor, parts: int) -> tuple[float, ...]:
            part = (rank * parts - 1).div(numbers, rounding_mode="floor")
            sums = torch.zeros(parts, dtype=values.dtype).index_add_(0, part, values)
            return tuple((sums / values.sum()).tolist())

        effects = []
        for weighting in weightings:
            weights = weighting.weights(positions[None], document_ids=documents[None])[0].to(wide_dtype(losses.device))
            weights = weights * own
            total = weights.sum()
            effects.append(
                PowerEffect(
                    power=weighting.power,
                    effective_sample_size=float(total**2 / (weights.square().sum() * len(weights))),
                    first_token=float(weights[rank == 1].sum() / total),
                    last_token=float(weights[rank == numbers].sum() / total),
                    quarters=shares(weights, QUARTERS),
                    deciles=shares(weights, BINS),
                    loss=float((weights * losses).sum() / total),
                )
            )
        lengths = numbers[rank == 1].sort().values
        return PowerReport(
            documents=len(lengths),
            lengths=(int(lengths[0]), int(lengths[(len(lengths) - 1) // 2]), int(lengths[-1])),
            first_token_loss=float(losses[rank == 1].mean()),
            last_token_loss=float(losses[rank == numbers].mean()),
            loss_quarters=shares(losses, QUARTERS),
            loss_deciles=shares(losses, BINS),
            effects=tuple(effects),
        )
