r"""Measure, all through training, how far back the gradients of the targets' losses reach, with and without t^p.

Mamba-2 learns from scratch to copy ten digits over a blank of sixty, and is measured at every fiftieth step:

    accelerate launch recipes/laboratory/gradients_by_lag.py --config copying/small_attention --model_type mamba2 \
        --config_overrides small --temporal_power 4 --output_dir outputs/gradients_mamba2

A quick try of all steps, seconds:

    accelerate launch recipes/laboratory/gradients_by_lag.py --config copying/small_attention --max_steps 2 \
        --eval_steps 1 --measure_every 1 --measured_examples 2 --max_eval_samples 4 \
        --output_dir outputs/gradients_by_lag_look

All else is as in `finetune_causal_lm.py`. A comparison of p trains each p on several seeds; then its folder is summed
up in a JSON file with all values, a table and a picture. `--redraw` makes these two from the file again:

    python recipes/compare_powers.py --grid recipes/laboratory/comparisons/gradients_by_lag.yaml
    python recipes/laboratory/gradients_by_lag.py --sum_up outputs/gradients_by_lag --output_dir outputs/lag_report
    python recipes/laboratory/gradients_by_lag.py --redraw recipes/results/gradients_by_lag.json \
        --output_dir outputs/lag_report
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_temporal.compare.quantities import Difference, mean_interval, number, paired_difference
from hf_temporal.compare.summary import SUMMARY_NAME, read_summary
from hf_temporal.data import argument, check_counts
from hf_temporal.data.copying import argmax_of_logits
from hf_temporal.errors import run_script
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS, prepare_causal_lm
from hf_temporal.finetuning.report import load_evaluations
from hf_temporal.finetuning.run import command_line
from hf_temporal.finetuning.tasks import Recorder
from hf_temporal.finetuning.trainers import CausalTrainer
from hf_temporal.model.undisturbed import undisturbed
from hf_temporal.positions import IGNORE_INDEX, target_positions
from hf_temporal.tables import markdown, write_json

NAME = "gradients_by_lag"
KINDS = {"weighted": "with the weights t^p", "unweighted": "without weights"}
DIGITS = 4  # significant ones of a value in the file


@dataclass
class LagArguments:
    """When, and on how many examples, gradients are measured."""

    measure_every: int = argument(50, "Steps between two measurements; a multiple of eval_steps.")
    measured_examples: int = argument(32, "The first of the validation examples, which have to be equally long.")

    def __post_init__(self) -> None:
        check_counts(measure_every=self.measure_every, measured_examples=self.measured_examples)


ARGUMENTS = (*CAUSAL_ARGUMENTS[:-1], LagArguments, CAUSAL_ARGUMENTS[-1])


def gradients_by_lag(model: nn.Module, inputs: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """How much the losses of all targets depend on the state at each lag s before the one that answers them.

        g(s) = mean over examples of Σ_t w_t ‖∂ℓ_t/∂h_{t−s}‖,   s = 0..time − 2

    ℓ_t is the loss of the target that the model answers at the t-th token, and w_t its weight. h is the embedding of a
    token as it enters the first layer. A later position reads an earlier one through the layers alone, so that this
    derivative sums all ways from there, whichever layer carries the memory. The norm is Euclidean, over the features.

    Args:
        model: a decoder-only model whose loss is the cross-entropy of its logits, shifted.
        inputs: a batch of equally long rows, with `input_ids` and `labels`, `[batch, time]`.
        weights: `[kinds, batch, time]`, aligned with the labels; the gradients are the same for all kinds of weights.

    Returns:
        `[kinds, time − 1]`, float64.
    """
    labels, states = inputs["labels"], []

    def as_leaf(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        states.append(embedded.detach().requires_grad_())
        return states[0]

    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    with undisturbed(model), torch.enable_grad(), embeddings.register_forward_hook(as_leaf):
        given = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**given, use_cache=False).logits[:, :-1]
        targets = labels[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
        sums = torch.zeros(len(weights), targets.shape[1], dtype=torch.float64)
        for t in (targets != IGNORE_INDEX).any(0).nonzero()[:, 0].tolist():
            # no example depends on another, so that the gradient of their sum holds that of each
            (gradient,) = torch.autograd.grad(losses[:, t].sum(), states[0], retain_graph=True)
            norms = gradient[:, : t + 1].norm(dim=-1).flip(1)
            sums[:, : t + 1] += (weights[..., t + 1].to(norms) @ norms).double().cpu()
    return sums / len(labels)


def distant_sum(by_lag: Sequence[float]) -> float:
    """Σ_{s > T/2} g(s) of T lags."""
    return sum(by_lag[len(by_lag) // 2 + 1 :])


def distant_share(by_lag: Sequence[float]) -> float:
    """Σ_{s > T/2} g(s) / Σ_s g(s) of T lags."""
    return distant_sum(by_lag) / sum(by_lag)


class LagTrainer(CausalTrainer):
    """Adds the gradients by lag to what every so many steps' evaluation records."""

    def __init__(self, *args: Any, lags: LagArguments, scores: Recorder, **kwargs: Any) -> None:
        self._lags, self._scores = lags, scores
        super().__init__(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().evaluation_loop(*args, **kwargs)
        if self.state.global_step % self._lags.measure_every == 0:
            examples: Any = self.eval_dataset
            count = min(self._lags.measured_examples, len(examples))
            batch = self._prepare_inputs(self.data_collator([examples[index] for index in range(count)]))
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            positions = target_positions(inputs["labels"])
            weights = torch.stack([self.weighting.weights(positions), (positions > 0).float()])
            found = gradients_by_lag(self.accelerator.unwrap_model(self.model), inputs, weights).tolist()
            self._scores.record.update(zip(KINDS, found, strict=True))
        return output


def train(argv: Sequence[str]) -> None:
    """Train, evaluate and measure before and after and on the way, and report."""
    parsed = parse(ARGUMENTS, argv, description=__doc__)
    lags, args = parsed[-2:]
    if lags.measure_every % args.eval_steps:
        given = f"measure_every={lags.measure_every!r} and eval_steps={args.eval_steps!r}"
        raise ValueError(f"{given}: it is measured at evaluations; accepted: a multiple of eval_steps.")
    run = prepare_causal_lm(parsed)
    if run.compute_metrics is None:
        raise ValueError("an answer is generated in this task; accepted: one whose answers are read off the rows.")
    trainer = LagTrainer(
        run.model,
        args,
        **run.for_trainer(),
        preprocess_logits_for_metrics=argmax_of_logits,
        lags=lags,
        scores=run.compute_metrics,
    )
    run.finish(trainer, command_line(__file__, argv, args))


def summed_up(folder: Path) -> dict[str, Any]:
    """All that the finished runs of a comparison of models measured.

    - `commands`, `settings` and `environment` of its `summary.json`;
    - `steps`: by model, for each p the steps until recall is reached, as that has them;
    - `runs`: for each `model`, `power` and `seed` by step the `recall`, the loss of the first quarter of the targets
      (`head_loss`), and g(s) for s = 0, 1, …, `weighted` and `unweighted`.
    """
    summary = read_summary(folder / SUMMARY_NAME)
    steps, runs = {}, []
    for combination in summary["combinations"]:
        model = combination["values"]["model_type"]
        (steps[model],) = (
            [{name: row[name] for name in ("power", "values", "not_reached", "mean", "interval")} for row in by_power]
            for by_power in (each["by_power"] for each in combination["quantities"] if "until" in each["title"])
        )
        for cell in [cell for cell in combination["cells"] if cell["state"] == "finished"]:
            evaluations = load_evaluations(folder / combination["folder"] / cell["folder"])
            measured = [each for each in evaluations if "weighted" in each]
            run = {"model": model, "power": cell["power"], "seed": cell["seed"]}
            for name in ("recall", "head_loss"):
                run[name] = {str(each["step"]): each["metrics"][f"eval_{name}"] for each in evaluations}
            run |= {kind: {str(each["step"]): _rounded(each[kind]) for each in measured} for kind in KINDS}
            runs.append(run)
    kept = {name: summary[name] for name in ("commands", "settings", "environment")}
    return {**kept, "steps": steps, "runs": runs}


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


class Measured:
    """What all runs measured, by model, kind of weights, p and step."""

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self._runs = runs
        self.models = list(dict.fromkeys(run["model"] for run in runs))
        self.powers = sorted({run["power"] for run in runs})
        self.steps = sorted({int(step) for run in runs for step in run["weighted"]})

    def of(self, model: str, power: float, name: str, step: int) -> dict[int, Any]:
        """g, or the recall, by seed."""
        runs = [run for run in self._runs if (run["model"], run["power"]) == (model, power)]
        return {run["seed"]: run[name][str(step)] for run in runs if str(step) in run[name]}

    def shares(self, model: str, power: float, kind: str, step: int) -> dict[int, float]:
        """The share of distant lags by seed."""
        return {seed: distant_share(by_lag) for seed, by_lag in self.of(model, power, kind, step).items()}

    def sums(self, model: str, power: float, step: int) -> dict[int, float]:
        """The logarithm of the sum over distant lags, without weights, by seed."""
        sums = {seed: distant_sum(g) for seed, g in self.of(model, power, "unweighted", step).items()}
        return {seed: math.log(value) if value > 0 else math.nan for seed, value in sums.items()}


def report(content: Mapping[str, Any]) -> str:
    """The steps that each p needs, and a table: recall and shares at each p and measured step, and their differences.

    The last columns are the ratio of Σ_{s > T/2} g(s), without weights, to that at p = 0: the mean over seeds of its
    logarithm.
    """
    found = Measured(content["runs"])
    others = [power for power in found.powers if power != 0]
    head = [f"recall, p = {power:g}" for power in found.powers]
    for words in KINDS.values():
        head += [f"share {words}, p = {power:g}" for power in found.powers]
        head += [f"difference, p = {power:g}" for power in others]
    lines = [["model", "step", *head, *(f"ratio of the sums, p = {power:g}" for power in others)]]
    for model in found.models:
        for step in found.steps:
            line = [model, str(step), *(_mean(found.of(model, power, "recall", step)) for power in found.powers)]
            for kind in KINDS:
                shares = {power: found.shares(model, power, kind, step) for power in found.powers}
                line += map(_mean, shares.values())
                line += [_shown(paired_difference(shares[power], shares[0.0])) for power in others]
            sums = {power: found.sums(model, power, step) for power in found.powers}
            lines.append([*line, *(_shown(paired_difference(sums[each], sums[0.0]), math.exp) for each in others)])
    needed = [
        f"{model}, p = {row['power']:g}: {number(row['mean'])} steps until recall is reached, "
        f"{len(row['not_reached'])} of {len(row['values'])} runs later."
        for model, rows in content["steps"].items()
        for row in rows
    ]
    return "\n".join([*needed, "", markdown(lines)])


def _mean(by_seed: Mapping[int, float]) -> str:
    return number(sum(by_seed.values()) / len(by_seed))


def _shown(found: Difference, back: Callable[[float], float] = float) -> str:
    """The mean of the differences and its interval, mapped back by `back`."""
    if found.difference is None:
        return "–"
    text = number(back(found.difference))
    return f"{text} [{', '.join(number(back(end)) for end in found.interval)}]" if found.interval else text


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the shares over training, a column of panels for each model: the mean and its 95 % interval for each p."""
    from matplotlib.figure import Figure  # matplotlib takes its time

    from hf_temporal.plots import COLORS, LINE_STYLES, grid, power_label, saved

    found = Measured(runs)
    figure = Figure(figsize=(0.8 + 3.6 * len(found.models), 5.6), layout="constrained")
    panels = figure.subplots(len(KINDS), len(found.models), sharex=True, sharey="row", squeeze=False)
    for row, (kind, words) in zip(panels, KINDS.items(), strict=True):
        row[0].set_ylim(0, 1)
        row[0].set_ylabel(f"share of lags beyond half\n{words}")
        for axes, model in zip(row, found.models, strict=True):
            for power, color, style in zip(found.powers, COLORS, LINE_STYLES, strict=False):
                values = [[*found.shares(model, power, kind, step).values()] for step in found.steps]
                means = [sum(each) / len(each) for each in values]
                bands = [mean_interval(each) or (each[0], each[0]) for each in values]
                label = f"p = {power_label(power)}"
                axes.plot(found.steps, means, color=color, linestyle=style, marker="o", ms=3, lw=2, label=label)
                axes.fill_between(found.steps, *zip(*bands, strict=True), color=color, alpha=0.2, lw=0)
            grid(axes)
    for axes, model in zip(panels[0], found.models, strict=True):
        axes.set_title(model)
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    panels[0, 0].legend(frameon=False)
    saved(figure, path)


def tell(argv: Sequence[str]) -> None:
    """Print the table and draw the picture of a comparison, whose file is written, or of such a file."""
    parser = argparse.ArgumentParser(description="The table and the picture of gradients by lag.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sum_up", type=Path, help="The folder of a comparison; the JSON file is written, too.")
    source.add_argument("--redraw", type=Path, help="The JSON file.")
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder to write into.")
    flags = parser.parse_args(argv)
    if flags.redraw:
        found = json.loads(flags.redraw.read_text(encoding="utf-8"))
    else:
        found = summed_up(flags.sum_up)
        flags.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(flags.output_dir / f"{NAME}.json", found, line_by_line="runs")
    draw(found["runs"], flags.output_dir / f"{NAME}.png")
    print(f"{report(found)}\n\n{flags.output_dir / NAME}.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure, or sum up what was measured."""
    argv = sys.argv[1:] if argv is None else argv
    tells = any(word.partition("=")[0] in ("--sum_up", "--redraw") for word in argv)
    tell(argv) if tells else train(argv)


if __name__ == "__main__":
    run_script(main)
