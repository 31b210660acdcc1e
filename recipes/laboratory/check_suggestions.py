r"""Hold what `suggest_power` says before training against what the comparisons of p found afterwards.

All of them in recipes/results, minutes on two CPU cores:

    python recipes/laboratory/check_suggestions.py --output outputs/suggestions.json

A quick try, on one of them:

    python recipes/laboratory/check_suggestions.py --summaries recipes/results/copying_t5_15.json

For each comparison it makes the model and the data of the first seed anew from the settings in its `summary.json`, and
trains nothing. It counts how often the warnings were right, and how often some rules for when p > 0 helps would be.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import yaml

from hf_temporal import TemporalWeightTrainer, suggest_power
from hf_temporal.compare.quantities import Difference, compare, direction_of
from hf_temporal.compare.report import Part, parts_of
from hf_temporal.compare.summary import read_summary
from hf_temporal.errors import run_script
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.recipe import (
    CAUSAL_ARGUMENTS,
    SEQ2SEQ_ARGUMENTS,
    FineTuning,
    prepare_causal_lm,
    prepare_seq2seq,
)
from hf_temporal.suggest import WARNINGS, PowerReport
from hf_temporal.tables import environment, table, write_json

RESULTS = Path(__file__).parents[1] / "results"
RECIPES: dict[str, tuple[Callable[..., FineTuning], tuple[Any, ...]]] = {
    "finetune_causal_lm.py": (prepare_causal_lm, CAUSAL_ARGUMENTS),
    "finetune_seq2seq.py": (prepare_seq2seq, SEQ2SEQ_ARGUMENTS),
}
# The comparisons that were known when the rules below were looked for; on others they are tested.
KNOWN = {
    *("copying_depth_tcn", "copying_lengths", "copying_llama_100", "copying_llama_200", "copying_memory_powers"),
    *("copying_mixture", "copying_t5_15", "copying_t5_30"),
    *("docstrings_mixture", "docstrings_smollm2", "passages_smollm2"),
}
UNCOMPARED = (
    "powers={!r}: no p > 0 is compared with p = 0; accepted: finished runs of both, with at least two seeds in common"
)
EXAMPLES = 64  # by default suggest_power reads 256, minutes for SmolLM2's passages
VERDICTS = ("better", "not told apart", "worse")
DECIDES = "what decides"
# Each warning with what it is judged by: what decides in a comparison, and what its own words are about.
WARNS_OF = (
    *((name, DECIDES) for name in WARNINGS),
    ("beginning", "loss, first quarter"),
    ("last token", "empty texts"),
    ("any", DECIDES),
)

# Of a comparison: what is said of it, and in `powers` what is said and what happened at each p.
Record = dict[str, Any]
Rule = Callable[[Record, Record], bool]  # of a comparison and one of its p


@dataclass(frozen=True)
class Outcomes:
    """What a comparison found at each p > 0."""

    summary: Mapping[str, Any]  # that it is in
    part: Part
    by_power: dict[float, Record]

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.summary["title"], self.part.name)))

    def runs(self, power: float) -> tuple[float, ...]:
        """The losses at the end at this p and at 0: two comparisons that share them share the runs."""
        (loss,) = (quantity for quantity, _ in self.part.found if quantity.title == "loss")
        return tuple(value for each in (power, 0.0) for _, value in sorted(loss.values[each].items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Look at the models, join what is said of them with what happened, print the counts and write the file."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--summaries", type=Path, nargs="+", help="each a summary.json; without: all that can be used")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args(argv)
    shipped = [path for path in sorted(RESULTS.glob("*.json")) if is_summary(path)]
    found: list[Outcomes] = []
    left_out: dict[str, str] = {}
    for path in given.summaries or shipped:
        here, reasons = outcomes_in(read_summary(path))
        if given.summaries and not here:
            raise ValueError(f"{path}: {next(iter(reasons.values()))}")
        found += here
        left_out |= reasons
    comparisons = [look(each) for each in once_each(found, left_out)]
    known = [each for each in comparisons if each["summary"] in KNOWN]
    groups = {"known": known, "new": [each for each in comparisons if each["summary"] not in KNOWN]}
    counts = {name: counted(group, known) for name, group in groups.items() if group}
    for name, tables in counts.items():
        print(f"\n# {len(groups[name])} {name} comparisons")
        for rows in tables.values():
            print(f"\n{table([printed(row) for row in rows], [*rows[0]])}")
    print()
    print(*(f"Left out, {name}: {reason}" for name, reason in left_out.items()), sep="\n")
    if given.output:
        results = {**environment(), "counts": counts, "left_out": left_out, "comparisons": comparisons}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.output, results)


def is_summary(path: Path) -> bool:
    """Whether a file of results is the summary of a comparison of p."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return not {"quantities", "combinations"}.isdisjoint(content)


def printed(row: Record) -> dict[str, Any]:
    """The row of a table, its hits as `3 of 5`."""
    return {name: f"{value[0]} of {value[1]}" if isinstance(value, list) else value for name, value in row.items()}


# ---- what is said, and what happened


def outcomes_in(summary: Mapping[str, Any]) -> tuple[list[Outcomes], dict[str, str]]:
    """What the comparisons in a summary found, and by name why others are left out."""
    found, left_out = [], {}
    for part in parts_of(summary):
        reason = why_not(summary, part)
        here = Outcomes(summary, part, {} if reason else outcomes_of(part, summary["metric"]))
        if here.by_power:
            found.append(here)
        else:
            left_out[here.name] = reason or UNCOMPARED.format(summary["powers"])
    return found, left_out


def why_not(summary: Mapping[str, Any], part: Part) -> str:
    """Why nothing that `suggest_power` says is about this comparison; else empty."""
    settings, metric = summary["settings"], summary["metric"]
    flags = " ".join([*settings["overrides"], *part.values, *(settings["config"] or {})])
    if settings["recipe"] not in RECIPES:
        return f"recipe={settings['recipe']!r}, whose targets are no tokens; accepted: {', '.join(RECIPES)}"
    if "control" in part.values:
        return f"control={part.values['control']!r} in the place of t^p; accepted: t^p"
    if "temporal_power_schedule" in flags:
        return "temporal_power_schedule, and a warning is about a constant p; accepted: without a schedule"
    if direction_of(metric) == 0:
        return f"metric={metric!r}, of which neither more nor less is better; accepted: another metric"
    return ""


def look(found: Outcomes) -> Record:
    """What `suggest_power` says of the untrained model and the data, beside the outcome at each p."""
    summary, part, outcomes = found.summary, found.part, found.by_power
    settings = summary["settings"]
    prepare, kinds = RECIPES[settings["recipe"]]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump(settings["config"] or {}), encoding="utf-8")
        varied = [f"--{name}={value}" for name, value in part.values.items()]
        own = ["--suggest_power", "--eval_strategy=no", "--report_to=none", f"--output_dir={folder}"]
        seed = f"--seed={summary['seeds'][0]}"
        parsed = parse(kinds, ["--config", str(config), *settings["overrides"], *varied, *own, seed])
        run = prepare(parsed)
        report = suggest_power(
            TemporalWeightTrainer(
                run.model,
                run.training_args,
                train_dataset=run.splits["train"],
                data_collator=run.data_collator,
                processing_class=run.tokenizer,
            ),
            powers=[*outcomes],
            max_examples=EXAMPLES,
        )
    flags = {name: value for each in parsed for name, value in vars(each).items()}
    return {
        "summary": summary["title"],
        "values": dict(part.values),
        "form": flags["copying_form"] if flags["task"] == "copying" else flags["task"],
        "mixture": flags["temporal_mixture"],
        "from_scratch": flags["model_type"] is not None,
        "encoder_decoder": bool(run.model.config.is_encoder_decoder),
        "ends_text": next(iter(run.splits["train"]))["labels"][-1] == run.tokenizer.eos_token_id,
        **where_the_loss_is(report),
        "powers": [
            {
                "power": effect.power,
                "first_token": effect.first_token,
                "quarters": effect.quarters,
                "last_token": effect.last_token,
                "effective_sample_size": effect.effective_sample_size,
                "warnings": report.warnings(effect),
                **outcomes[effect.power],
            }
            for effect in report.effects
            if effect.power in outcomes
        ],
    }


def where_the_loss_is(report: PowerReport) -> Record:
    """What the report says of the data; `late` is the last quarter's share of the loss without the first tokens."""
    usual = report.usual
    of_first = report.first_token_loss * usual.first_token / usual.loss
    return {
        "documents": report.documents,
        "lengths": report.lengths,
        "loss": usual.loss,
        "first_token_loss": report.first_token_loss,
        "last_token_loss": report.last_token_loss,
        "loss_quarters": report.loss_quarters,
        "late": report.loss_quarters[-1] / (1 - of_first),
        "late_tokens": usual.quarters[-1] / (1 - usual.first_token),
    }


def outcomes_of(part: Part, metric: str) -> dict[float, Record]:
    """How each p > 0 did against p = 0 in what decides, and the verdicts on what the warnings speak of.

    Of summaries their ROUGE and the loss decide: worse is what is worse in one of them. Elsewhere the metric does, or
    the steps until it is reached if at least half of the runs get there.
    """
    if not part.found:
        return {}
    (decisive, _), *others = part.found
    by_title = {quantity.title: quantity for quantity, _ in part.found}
    deciding = [decisive]
    if metric.startswith("rouge"):
        deciding.append(by_title["loss"])
    elif len(part.decisive) > 1 and 2 * len(others[0][0].bounds) <= sum(map(len, others[0][0].values.values())):
        deciding = [replace(others[0][0], is_ratio=True)]
    compared = [compare(quantity) for quantity in deciding]
    spoken_of = {title: compare(by_title[title]) for _, title in WARNS_OF if title in by_title}
    return {
        power: {
            "decided_by": {
                quantity.title: asdict(each[power]) for quantity, each in zip(deciding, compared, strict=True)
            },
            "verdicts": {
                DECIDES: joint([each[power] for each in compared]),
                **{title: each[power].verdict for title, each in spoken_of.items()},
            },
        }
        for power in compared[0]
        if power > 0 and all(each[power].verdict != "not compared" for each in compared)
    }


def joint(differences: Sequence[Difference]) -> str:
    """Worse if one of the verdicts is, else better if one is, else not told apart."""
    verdicts = {each.verdict for each in differences}
    return next(each for each in ("worse", "better", "not told apart") if each in verdicts)


def once_each(found: Sequence[Outcomes], left_out: dict[str, str]) -> list[Outcomes]:
    """Leave out each p whose runs another comparison has, one of at least as many p."""
    seen: dict[tuple[float, ...], str] = {}
    for each in sorted(found, key=lambda each: -len(each.by_power)):
        for power in [*each.by_power]:
            runs = each.runs(power)
            if runs in seen:
                del each.by_power[power]
                left_out[f"{each.name}, p = {power:g}"] = f"the runs of {seen[runs]}"
            seen.setdefault(runs, each.name)
    return [each for each in found if each.by_power]


# ---- how often it was right


def counted(comparisons: Sequence[Record], known: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of three tables."""
    return {
        "outcomes": outcomes_by_power(comparisons),
        "warnings": hits_of_warnings(comparisons),
        "rules": hits_of_rules(comparisons, known),
    }


def outcomes_by_power(comparisons: Sequence[Record]) -> list[Record]:
    """How many comparisons of t^p alone found each p better, worse, or neither."""
    plain = [row for each in comparisons if each["mixture"] == 1 for row in each["powers"]]
    found = Counter((row["power"], row["verdicts"][DECIDES]) for row in plain)
    powers = sorted({row["power"] for row in plain})
    return [{"p": power, **{verdict: found[power, verdict] for verdict in VERDICTS}} for power in powers]


def hits_of_warnings(comparisons: Sequence[Record]) -> list[Record]:
    """How often a warning was said where p is worse, or not said where it is not.

    `never` is how often it would be right never to warn. Each row is a p of a comparison.
    """
    rows = [(each, row) for each in comparisons for row in each["powers"]]
    counts = []
    for name, spoken_of in WARNS_OF:
        judged = [
            (warned(each, row, name), row["verdicts"][spoken_of] == "worse")
            for each, row in rows
            if spoken_of in row["verdicts"]
        ]
        counts.append(
            {
                "warning": name,
                "judged by": spoken_of,
                "hits": hits(judged),
                "false alarms": judged.count((True, False)),
                "misses": judged.count((False, True)),
                "never": hits([(False, is_worse) for _, is_worse in judged]),
            }
        )
    return counts


def hits(judged: Sequence[tuple[bool, bool]]) -> list[int]:
    """How many pairs agree, and of how many."""
    return [sum(one == other for one, other in judged), len(judged)]


def warned(comparison: Record, row: Record, name: str) -> bool:
    """Whether a warning, or any, is said, and its condition that the last token ends the text holds."""
    hold = [each for each in row["warnings"] if each != "last token" or comparison["ends_text"]]
    return bool(hold) if name == "any" else name in hold


def hits_of_rules(comparisons: Sequence[Record], known: Sequence[Record]) -> list[Record]:
    """How often each rule was right about which p is better than 0, and about whether any p of a comparison is."""
    counts = []
    for rule, says in rules(known).items():
        judged = [
            [(row["power"], says(each, row), row["verdicts"][DECIDES] == "better") for row in each["powers"]]
            for each in comparisons
        ]
        flat = [found for each in judged for found in each]
        counts.append(
            {
                "p is better than 0": rule,
                "each p": hits([found[1:] for found in flat]),
                "p = 1": hits([found[1:] for found in flat if found[0] == 1]),
                "any p of a comparison": hits(
                    [(any(said for _, said, _ in each), any(better for *_, better in each)) for each in judged]
                ),
            }
        )
    return counts


def rules(known: Sequence[Record]) -> dict[str, Rule]:
    """When p is said to be better than 0; a threshold is chosen on the known comparisons of other models and data."""

    def best_threshold(late: float) -> float:
        others = [
            (each["late"], any(row["verdicts"][DECIDES] == "better" for row in each["powers"])) for each in known
        ]
        others = [other for other in others if other[0] != late]
        return max(
            sorted({-inf, inf, *(value for value, _ in others)}),
            key=lambda least: hits([(value >= least, better) for value, better in others])[0],
        )

    return {
        "never": lambda _, __: False,
        "always": lambda _, __: True,
        "no warning": lambda each, row: not warned(each, row, "any"),
        "first token not warned of": lambda each, row: not warned(each, row, "first token"),
        "late tokens have their share of the loss": lambda each, _: each["late"] >= each["late_tokens"],
        "late share of the loss, best threshold": lambda each, _: each["late"] >= best_threshold(each["late"]),
        "from scratch": lambda each, _: each["from_scratch"],
        "from scratch, decoder alone, digits after a blank": lambda each, _: (
            each["from_scratch"] and not each["encoder_decoder"] and each["form"] == "digits"
        ),
    }


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
