"""The page of what a sweep found: one table, and what its cells mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

from .answers import ALONE, IN_BATCHES, OTHERS, OWN
from .cases import LAYOUTS, Found, Report

BATCHWISE = "exact for the batch's logits"
RIGHT = ("exact", BATCHWISE)
WRONG = "**wrong**"
COMMAND = "python -m tests.sweep --out docs/models.md"

INTRODUCTION = """\
# Models

Every causal, sequence-to-sequence, image–text and speech class of transformers, made tiny with random weights and
trained for one step in float32 on a CPU, on text (speech models on random features). Four rows of 5 to 12 tokens come
in four layouts: padded on the right, padded on the left, packed by `DataCollatorWithFlattening`, and accumulated over
two micro-batches of two rows. The loss and the whole gradient of `TemporalWeightTrainer` are compared with float64 at
p = 0 and p = 2, and at p = 0 with those of the Trainer. The auxiliary losses of mixtures of experts are off, as in
their configurations.

Made by `{command}`, with {versions}.

| Cell | What it says of p = 0 and p = 2 |
|---|---|
| exact | each row has the loss that it has by itself |
| batch's logits | a row's logits depend on its batch (padding, batch normalization); its loss, too |
| Trainer 2.00 × | the Trainer's loss at p = 0 is so many times the right one |
| Trainer's gradient | the Trainer's loss at p = 0 is right to two digits, its gradient is not |
| Trainer: batch's logits | the Trainer gives no `position_ids`, without which padding changes the logits |
| refused | an error before the first step: the model does not keep the documents of a row apart |
| own loss | not the cross-entropy of the logits: the Trainer's at p = 0, an error that says so at p = 2 |
| does not run | the Trainer raises the same error |
| – | no such layout for an encoder–decoder |

A cell that does not name the Trainer holds for it, too, at p = 0. Its usual differences: under accumulation, near 2 ×,
it adds up the means of the micro-batches, and near 1 × it takes their mean, whatever their numbers of targets; near
0.93 × on the right it counts the first token of a row, which nothing predicts, as a target; on the left it predicts
the first real token from padding, and positions count the padding.

| Answers | What an evaluation generates for prompts of one length, of several, and with a common beginning |
|---|---|
| in batches | for each prompt what it is answered alone, every token of the row computed anew for each new one |
| one at a time | the same; in a batch a row would get another answer (it reads or counts padding, or rows are mixed) |
| generate's own | what `generate` gives for a prompt alone, in a batch too, which the logits of the row do not say |
| – | an encoder–decoder, or a model that needs an image |
"""


def cell(found: Found | None) -> str:
    """What a layout shows, in a phrase."""
    if found is None:
        return "–"
    stock, zero, weighted = found.stock, found.zero, found.weighted
    zero = stock if zero == "as stock" else zero
    if stock.startswith("raised") and zero == stock:
        return "does not run"
    if zero == stock == "a loss of its own" and weighted.startswith("refused"):
        return "own loss"
    if zero.startswith("refused") and weighted.startswith("refused"):
        return "refused"
    if zero not in RIGHT or weighted not in RIGHT:
        return WRONG
    name = "batch's logits" if BATCHWISE in (zero, weighted) else "exact"
    if stock == zero:
        return name
    if stock == BATCHWISE:
        return f"{name}; Trainer: batch's logits"
    if stock.startswith("loss "):
        ratio = f"{float(stock.split()[1]):.2f}"
        return f"{name}; Trainer's gradient" if ratio == "1.00" else f"{name}; Trainer {ratio} ×"
    return f"{name}; Trainer: {stock.split(':')[0]}"


def answers_cell(report: Report) -> str:
    """How the model's answers are generated, in a phrase."""
    if report.answers in ("", IN_BATCHES, ALONE, OWN):
        return report.answers or "–"
    return WRONG if report.answers == OTHERS else f"not run: {_short(report.answers)}"


def faults(reports: Sequence[Report]) -> list[str]:
    """The layouts in which ours is neither right nor refused in words, what was found, and answers that are wrong."""
    return [
        f"{report.kind}, {layout}: Trainer {found.stock}; p = 0 {found.zero}; p = 2 {found.weighted}"
        for report in reports
        for layout, found in report.layouts.items()
        if cell(found) == WRONG
    ] + [f"{report.kind}: answers of a batch are others than alone" for report in reports if report.answers == OTHERS]


def counts(reports: Sequence[Report]) -> Counter[str]:
    """How many classes there are of each verdict."""
    return Counter(_verdict(report) for report in reports)


def _verdict(report: Report) -> str:
    cells = [cell(found) for found in report.layouts.values()]
    if not cells:
        return "not run"
    if WRONG in cells:
        return "wrong in a layout"
    if "own loss" in cells or "does not run" in cells:
        return "own loss, or a layout that the Trainer cannot train"
    kind = "batch's logits in a layout" if any(each.startswith("batch's") for each in cells) else "exact"
    return f"{kind}, packed rows refused" if "refused" in cells else kind


def page(reports: Sequence[Report]) -> str:
    """The page in Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "accelerate"))
    reports = sorted(reports, key=lambda report: report.kind.lower())
    lines = [INTRODUCTION.format(command=COMMAND, versions=versions)]
    lines += ["| Classes | |", "|---|---|", f"| all | {len(reports)} |"]
    lines += [f"| {name} | {count} |" for name, count in sorted(counts(reports).items())]
    lines += ["", "| Classes by layout | Right | Left | Packed | Accumulated |", "|---|---|---|---|---|"]
    by_layout = {layout: [cell(report.layouts.get(layout)) for report in reports] for layout in LAYOUTS}
    for name in ("exact", "batch's logits", "refused", "own loss", "does not run"):
        numbers = (sum(each.startswith(name) for each in by_layout[layout]) for layout in LAYOUTS)
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    numbers = (sum("Trainer" in each for each in by_layout[layout]) for layout in LAYOUTS)
    lines.append(f"| the Trainer differs at p = 0 | {' | '.join(map(str, numbers))} |")
    lines += ["", "| Classes by answers | |", "|---|---|"]
    for name in (IN_BATCHES, ALONE, OWN, "not run"):
        lines.append(f"| {name} | {sum(answers_cell(report).startswith(name) for report in reports)} |")
    lines += ["", "| Class | Right | Left | Packed | Accumulated | Answers |", "|---|---|---|---|---|---|"]
    for report in reports:
        if report.reason:
            lines.append(f"| {report.kind} | not run: {_short(report.reason)} | | | | |")
        else:
            row = " | ".join(cell(report.layouts.get(layout)) for layout in LAYOUTS)
            lines.append(f"| {report.kind} | {row} | {answers_cell(report)} |")
    return "\n".join(lines) + "\n"


def _short(reason: str, most: int = 90) -> str:
    text = " ".join(reason.removeprefix("RuntimeError: its ").split()).replace("|", "/")
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0] + " …"
