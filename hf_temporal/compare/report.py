"""The report of a comparison over p, from its summary: words, tables and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from hf_temporal import power_plots
from hf_temporal.power_plots import PowerPanel
from hf_temporal.tables import table

from .cells import power_name
from .quantities import Difference, Quantity, compare, number, number_of, title_of

REPORT_NAME = "summary.md"
BY_POWER = "metric_by_power.png"
PICTURES = {
    BY_POWER: "What each p ends at",
    "loss_by_position.png": "Loss by position in the target at the last evaluation, mean over seeds",
    "memory.png": "Memory at the last evaluation, each seed thin, the mean thick, and its distance from the target's",
    "curves.png": "Every evaluation on the way",
}
MOST_COLUMNS = 5
HARDWARE = ("processor", "cores", "accelerator")
ARROWS = {1: " ↑", -1: " ↓", 0: ""}
UNTOLD = ("not told apart", "not compared")
NOTES = (Path(__file__).parent / "how_to_read.md").read_text(encoding="utf-8").rstrip()

Compared = tuple[Quantity, dict[float, Difference]]


@dataclass(frozen=True)
class Part:
    """The comparison of one combination of the varied values, or the only one of a summary where nothing is varied."""

    title: str  # of its report and pictures, and the name of its folder
    values: Mapping[str, str]  # the varied ones by name
    cells: Sequence[Mapping[str, Any]]  # all of them, as in the summary
    found: Sequence[Compared]  # each quantity with the comparison of each p with p = 0; empty if no cell is finished
    decisive: Sequence[Compared]  # those of the metric that decides
    command: str  # of the first cell

    @property
    def name(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.values.items())


def parts_of(summary: Mapping[str, Any]) -> list[Part]:
    """The comparisons that a summary holds, each p compared with p = 0 anew."""
    alone = {**summary, "folder": summary["title"], "values": {}, "command": summary["commands"][1]}
    parts = []
    for each in summary.get("combinations", [alone]):
        found = [(quantity, compare(quantity)) for quantity in map(Quantity.of_record, each["quantities"])]
        decisive = found[: 1 if summary["reach"] is None else 2]
        parts.append(Part(each["folder"], each["values"], each["cells"], found, decisive, each["command"]))
    return parts


def write_report(summary: Mapping[str, Any], output_dir: Path) -> str:
    """Write `summary.md` and the pictures that there are data for; with combinations, those of each of them, too.

    Returns:
        The words and the table of the report.
    """
    parts = parts_of(summary)
    if "combinations" not in summary:
        return _write_part(summary, parts[0], output_dir)
    for part in parts:
        if part.found:
            _write_part(summary, part, output_dir / part.title)
    _draw_side_by_side(summary["title"], parts, output_dir / BY_POWER)
    findings = "\n".join(map(_conclusions_of_part, parts)) + f"\n\n{_table_of_parts(parts)}"
    missing = [f"- {part.name}: {told}" for part in parts if (told := _missing(part.cells))]
    status = "\n".join(missing) or f"All {sum(len(part.cells) for part in parts)} cells are finished."
    _write(replace(parts[0], title=summary["title"]), [findings, status], [BY_POWER], summary, output_dir)
    return findings


def _write_part(summary: Mapping[str, Any], part: Part, output_dir: Path) -> str:
    pictures = _draw(part, output_dir)
    findings = f"{_conclusions(part.decisive)}\n\n{_table(part)}"
    status = _missing(part.cells) or f"All {len(part.cells)} cells are finished."
    _write(part, [findings, status], pictures, summary, output_dir)
    return findings


def _write(
    part: Part, words: Sequence[str], pictures: Sequence[str], summary: Mapping[str, Any], output_dir: Path
) -> None:
    about = summary["environment"]
    hardware = ", ".join(f"{name} {value}" for name, value in about["hardware"].items() if name in HARDWARE)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    sections = [
        f"# {part.title}: which p?",
        *words,
        *(f"![{PICTURES[name]}]({name})" for name in pictures),
        f"## How to read it\n\n{NOTES}",
        f"## How it was made\n\n```\n{summary['commands'][0]}\n```",
        "Each cell is one command with its own p, seed and folder, `--dry_run` prints them all; the first:",
        f"```\n{part.command}\n```",
        f"- seeds: {', '.join(map(str, summary['seeds']))}\n- hardware: {hardware}\n- versions: {versions}\n"
        f"- summary of {about['date']}\n",
    ]
    (output_dir / REPORT_NAME).write_text("\n\n".join(sections), encoding="utf-8")


def _conclusions(found: Sequence[Compared]) -> str:
    """For each quantity a line that sorts the p by verdict, then a sentence for each p."""
    paragraphs = []
    for quantity, differences in found:
        paragraphs.append(f"**{quantity.title}**, compared with p = 0: {_conclusion(differences)}.")
        paragraphs += ["\n".join(f"- {each.words}" for each in differences.values())] if differences else []
    return "\n\n".join(paragraphs)


def _conclusions_of_part(part: Part) -> str:
    if not part.found:
        return f"- {part.name}: no cell is finished."
    found = "; ".join(f"**{quantity.title}** {_conclusion(differences)}" for quantity, differences in part.decisive)
    return f"- [{part.name}]({quote(part.title)}/{REPORT_NAME}), compared with p = 0: {found}."


def _conclusion(differences: Mapping[float, Difference]) -> str:
    by_verdict: dict[str, list[str]] = {}
    for power, difference in sorted(differences.items(), key=lambda item: (item[1].verdict in UNTOLD, item[0])):
        by_verdict.setdefault(difference.verdict, []).append(power_name(power))
    found = "; ".join(f"{verdict} at p = {', '.join(powers)}" for verdict, powers in by_verdict.items())
    return found or "no other p is finished"


def _missing(cells: Sequence[Mapping[str, Any]]) -> str:
    """The cells that are not finished, empty where all are."""
    names = [
        f"p = {power_name(cell['power'])} with seed {cell['seed']}"
        + (f" (failed with exit status {cell['exit_status']})" if cell["state"] == "failed" else "")
        for cell in cells
        if cell["state"] != "finished"
    ]
    return f"Not finished, {len(names)} of {len(cells)} cells: {'; '.join(names)}." if names else ""


def _table(part: Part) -> str:
    columns = ["p", "seeds", *(f"{quantity.title}{ARROWS[quantity.direction]}" for quantity, _ in part.found)]
    rows = []
    for power, values in part.found[0][0].values.items():
        cells = [_table_cell(quantity, power, differences.get(power)) for quantity, differences in part.found]
        rows.append(dict(zip(columns, [power_name(power), str(len(values)), *cells], strict=True)))
    return table(rows, columns)


def _table_of_parts(parts: Sequence[Part]) -> str:
    powers = sorted({float(cell["power"]) for part in parts for cell in part.cells})
    rows = []
    for part in parts:
        for quantity, differences in part.decisive:
            counts = {len(values) for values in quantity.values.values()}
            row = {**part.values, "compared": f"{quantity.title}{ARROWS[quantity.direction]}"}
            row["seeds"] = " to ".join(map(str, sorted({min(counts), max(counts)})))
            for power in quantity.values:
                row[f"p = {power_name(power)}"] = _table_cell(quantity, power, differences.get(power))
            rows.append(row)
    return table(rows, [*parts[0].values, "compared", "seeds", *(f"p = {power_name(power)}" for power in powers)])


def _table_cell(quantity: Quantity, power: float, difference: Difference | None) -> str:
    """The mean, its interval and, where it is told apart from p = 0, the verdict."""
    values = quantity.values[power]
    missed = sum((power, seed) in quantity.bounds for seed in values)
    if missed == len(values):
        text = f"> {number(quantity.budget)}"
    else:
        text = number(quantity.mean(power))
        if interval := quantity.interval(power):
            text += f" [{number(interval[0])}, {number(interval[1])}]"
        if missed:
            text += f", {missed} of {len(values)} > {number(quantity.budget)}"
    return text if difference is None or difference.verdict in UNTOLD else f"{text} **{difference.verdict}**"


def _draw_side_by_side(title: str, parts: Sequence[Part], path: Path) -> None:
    """Draw each deciding quantity as a block of small panels, the values of the last varied flag along a row."""
    titles = ["\n".join(part.values.values()) for part in parts]
    along = len({list(part.values.values())[-1] for part in parts})
    columns = min(along, MOST_COLUMNS)
    blocks: list[PowerPanel | None] = []
    for index in range(max(len(part.decisive) for part in parts)):
        block = [
            _panel(part.decisive[index][0], title) if part.found else PowerPanel("", {}, {}, title=title)
            for part, title in zip(parts, titles, strict=True)
        ]
        label = max((panel.label for panel in block), key=len)  # The longest explains hollow dots.
        blocks += [*(replace(panel, label=label) for panel in block), *([None] * (-len(block) % columns))]
    power_plots.plot_metrics_by_power(blocks, path, title=f"{title}: {' / '.join(parts[0].values)}", columns=columns)


def _panel(quantity: Quantity, title: str | None = None) -> PowerPanel:
    return PowerPanel(
        quantity.title + ("\n(hollow: not reached)" if quantity.bounds else ""),
        quantity.values,
        {power: (quantity.mean(power), quantity.interval(power)) for power in quantity.values},
        quantity.bounds,
        quantity.is_ratio,
        title,
    )


def _draw(part: Part, output_dir: Path) -> list[str]:
    """Draw the pictures that all finished cells hold the data for, and return their names."""
    _, by_position, by_lag, on_the_way = PICTURES
    power_plots.plot_metrics_by_power(
        [_panel(each) for each, _ in part.decisive], output_dir / BY_POWER, title=part.title
    )
    drawn = {BY_POWER}
    if curves := _by_power(part.cells, "curves"):
        all_runs = [run for runs in curves.values() for run in runs]
        shown = {
            title_of(name): {
                power: [{int(step): number_of(value) for step, value in run[name].items()} for run in runs]
                for power, runs in curves.items()
            }
            for name in all_runs[0]
            if all(name in run for run in all_runs)
        }
        power_plots.plot_curves_by_power(shown, output_dir / on_the_way, title=part.title)
        drawn.add(on_the_way)
    if profiles := _by_power(part.cells, "bins"):
        means = {power: _mean_profile(each) for power, each in profiles.items()}
        power_plots.plot_loss_by_position_and_power(means, output_dir / by_position, title=part.title)
        drawn.add(by_position)
    if memories := _by_power(part.cells, "memory"):
        ((target, *_), *_) = _by_power(part.cells, "target_memory").values()
        power_plots.plot_memory_by_power(memories, target, output_dir / by_lag, title=part.title)
        drawn.add(by_lag)
    return [name for name in PICTURES if name in drawn]


def _by_power(cells: Sequence[Mapping[str, Any]], name: str) -> dict[float, list[Any]]:
    """What the finished cells hold under this name, by p; nothing unless all of them have it."""
    finished = [cell for cell in cells if cell["state"] == "finished"]
    if not all(cell.get(name) for cell in finished):
        return {}
    found: dict[float, list[Any]] = {}
    for cell in sorted(finished, key=lambda cell: float(cell["power"])):
        found.setdefault(float(cell["power"]), []).append(cell[name])
    return found


def _mean_profile(profiles: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The mean over seeds of the loss in each bin; None where no seed has a token."""
    bins = []
    for same_bin in zip(*profiles, strict=True):
        losses = [number_of(each["loss"]) for each in same_bin if each["loss"] is not None]
        bins.append({**same_bin[0], "loss": fmean(losses) if losses else None})
    return {"bins": bins}
