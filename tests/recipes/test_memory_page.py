"""The tables of docs/memory_tasks.md show what recipes/results/memory_tasks.json holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_temporal.compare.merged import Row, read_merged, rows_of
from recipes.laboratory.memory_table import VERDICTS, _seeds, _usual

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "memory_tasks.md").read_text("utf-8")
SECTIONS = {
    "mqar": "### Associative recall",
    "selective": "### Selective copying",
    "digits": "### Digits over a blank, in new models",
}
NAMES = {
    "llama": "Llama",
    "mamba2": "Mamba-2",
    "recurrent_gemma": "RecurrentGemma",
    "qwen3_next": "delta rule (`qwen3_next`)",
    "olmo_hybrid": "hybrid (`olmo_hybrid`)",
    "memory_attention": "attention",
    "memory_tcn": "TCN",
    "memory_state_space": "state space",
    "memory_linear_rnn": "linear RNN",
    "memory_tanh_rnn": "tanh RNN",
}


def shown(row: Row, columns: int) -> str:
    """The row of a table: p = 0, then each column's ratio of steps or difference of recall; bold: told apart."""
    cells = [NAMES[row.model], f"{row.metric.mean(0.0):.2f}".replace("1.00", "1"), _usual(row.steps)]
    for column in range(1, columns):
        if not (seeds := row.seeds(column)):
            cells.append("–")
            continue
        outcome = row.outcomes[column]
        found, is_told = outcome.found, outcome.found.verdict in VERDICTS
        value = found.ratio if outcome.quantity.is_ratio else found.difference
        assert value is not None
        assert found.interval is not None
        sign = "+" if is_told and not outcome.quantity.is_ratio and value > 0 else ""
        effect = f"{sign}{value:.2f} [{', '.join(f'{bound:.2f}' for bound in found.interval)}]".replace("-", "−")
        effect = f"**{effect}**" if is_told else effect
        cells.append(("" if outcome.quantity.is_ratio else "recall ") + effect + _seeds(seeds))
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("task", SECTIONS)
def test_the_page_shows_what_the_file_holds(task: str) -> None:
    content = read_merged(REPOSITORY / "recipes" / "results" / "memory_tasks.json")
    rows = next(rows_of(content, each) for each in content["tasks"] if each["title"] == task)
    section = PAGE.split(f"{SECTIONS[task]}\n")[1].split("\n### ")[0]
    titles, found = "", []
    for line in section.splitlines():
        if line.startswith("| model |"):
            titles = line
        elif line.startswith(tuple(f"| {name} |" for name in NAMES.values())):
            found.append(line)
    used = max(column for row in rows for column in row.outcomes)
    assert titles == f"| model | recall, p = 0 | steps, p = 0 | {' | '.join(content['columns'][1 : used + 1])} |"
    assert sorted(found) == sorted(shown(row, used + 1) for row in rows)
