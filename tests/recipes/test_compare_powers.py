"""A comparison over p: its statistics and words, and the running, failing, killing and going on of its cells."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from recipes import compare_powers, finetune_causal_lm
from recipes.compare_powers import cell_environment, ending, main, read_arguments
from recipes.comparison import (
    Cell,
    Quantity,
    compare,
    direction_of,
    holm,
    mean_interval,
    number,
    paired_difference,
    power_name,
    quantities,
)

from .conftest import Tiny

STUB = """
import argparse, json, os, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--temporal_power", type=float)
parser.add_argument("--seed", type=int)
parser.add_argument("--output_dir", type=Path)
parser.add_argument("--config")
parser.add_argument("--fail", nargs="*", default=[])
parser.add_argument("--wait", type=Path)
parser.add_argument("--gain", type=float, default=0.1)
flags = parser.parse_args()
folder = flags.output_dir
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as starts:
    starts.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\\n")
if folder.name in flags.fail:
    print("the cell's last words")
    sys.exit(3)
while flags.wait and not flags.wait.exists():
    time.sleep(0.02)
noise = [0.00, 0.02, -0.01, 0.015, 0.005][flags.seed] + 0.001 * flags.seed * flags.temporal_power
recall = min(1.0, 0.5 + flags.gain * min(flags.temporal_power, 4) + noise)
evaluations, profiles = [], []
for step in (0, 10, 20, 30):
    share = step / 30
    loss = 2 - share * recall
    metrics = {"recall": share * recall, "loss": loss, "head_loss": loss + 0.1, "tail_loss": loss, "gen_len": 9.0}
    metrics = {f"eval_{name}": value for name, value in metrics.items()}
    evaluations.append({"step": step, "metrics": metrics, "generated": [], "references": []})
    bins = [{"from": k / 10, "to": (k + 1) / 10, "loss": loss, "accuracy": None, "count": 5} for k in range(10)]
    profiles.append({"split": "eval", "step": step, "bins": bins})
(folder / "evaluations.json").write_text(json.dumps({"evaluations": evaluations}))
(folder / "loss_by_position.json").write_text(json.dumps({"version": 1, "profiles": profiles}))
(folder / "all_results.json").write_text("{}")
"""
LAUNCHED_DIRECTLY = """
import sys
from recipes import compare_powers
compare_powers.LAUNCHER = (sys.executable,)
sys.exit(compare_powers.main(sys.argv[1:]))
"""
WORSE, BETTER, CLOSE = [0.5, 0.52, 0.49], [0.7, 0.71, 0.7], [0.52, 0.5, 0.5]


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def quantity(direction: int = 1, **values: list[float]) -> Quantity:
    """Values by p, p written as `p_4` for 4."""
    return Quantity("recall", direction, {float(name[2:]): by_seed(each) for name, each in values.items()})


# ---- statistics


def test_interval_of_the_mean_by_hand() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert mean_interval([0.7, 0.7, 0.7]) == (0.7, 0.7)
    assert mean_interval([1.0]) is None
    assert mean_interval([1.0, math.nan, 1.0]) is None


def test_paired_difference_by_hand_and_by_scipy() -> None:
    found = paired_difference({0: 3.0, 1: 5.0, 2: 4.0, 7: 9.0}, {0: 1.0, 2: 1.0, 1: 1.0, 5: 0.0})
    assert found.seeds == [0, 1, 2]
    assert (found.mean, found.usual, found.difference) == (4, 1, 3)
    assert found.d_z == pytest.approx(3.0)  # differences 2, 4, 3: mean 3, standard deviation 1
    assert found.interval == pytest.approx((3 - 4.302653 / 3**0.5, 3 + 4.302653 / 3**0.5))
    assert found.p_value == pytest.approx(stats.ttest_rel([3, 5, 4], [1, 1, 1]).pvalue)


def test_ratios_are_compared_on_logarithms() -> None:
    steps = Quantity(
        "steps", -1, {0.0: by_seed([40.0, 100.0, 250.0]), 4.0: by_seed([10.0, 50.0, 50.0])}, is_ratio=True
    )
    found = compare(steps)[4.0]
    logs = np.log([[10, 50, 50], [40, 100, 250]])
    test = stats.ttest_rel(*logs)
    assert (found.mean, found.usual) == pytest.approx((25000 ** (1 / 3), 100))
    assert found.ratio == pytest.approx(40 ** (-1 / 3))  # of 1/4, 1/2, 1/5
    assert found.interval == pytest.approx(np.exp(test.confidence_interval(0.95)))
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.difference is None
    assert steps.interval(4.0) == pytest.approx(np.exp(mean_interval(list(logs[0])) or ()))
    assert found.words == (
        "p = 4: better. 29.2 instead of 100 at p = 0, which is 0.292 times as many [0.089, 0.958], d_z = −2.6, "
        "3 seeds; P-value 0.047."
    )


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_intervals_cover_and_claims_are_rarely_false() -> None:
    """600 comparisons of three p that change nothing or, the last one, add 0.3, with seeds that differ more than p."""
    random = np.random.default_rng(0)
    covered, false_claims, repeats = 0, 0, 600
    for _ in range(repeats):
        seeds = random.normal(0, 3, 5)
        effects = {0.0: 0.0, 1.0: 0.0, 2.0: 0.0, 4.0: 0.3}
        values = {power: by_seed(list(seeds + effect + random.normal(0, 1, 5))) for power, effect in effects.items()}
        found = compare(Quantity("recall", 1, values))
        low, high = found[4.0].interval or (0, 0)
        covered += low < 0.3 < high
        false_claims += any(found[power].verdict != "not told apart" for power in (1.0, 2.0))
    assert 0.93 < covered / repeats < 0.97
    assert 0.005 < false_claims / repeats < 0.06


@pytest.mark.parametrize(
    ("direction", "values", "verdict"),
    [
        (1, BETTER, "better"),
        (-1, BETTER, "worse"),
        (0, BETTER, "higher"),
        (1, [0.1, 0.12, 0.1], "worse"),
        (-1, [0.1, 0.12, 0.1], "better"),
        (0, [0.1, 0.12, 0.1], "lower"),
        (1, CLOSE, "not told apart"),
    ],
)
def test_verdicts(direction: int, values: list[float], verdict: str) -> None:
    found = compare(quantity(direction, p_0=WORSE, p_2=values))[2.0]
    assert found.verdict == verdict
    assert found.words.startswith(f"p = 2: {verdict}.")


def test_more_powers_make_claims_harder() -> None:
    marginal = [0.62, 0.58, 0.6]
    alone = compare(quantity(p_0=WORSE, p_2=marginal))[2.0]
    among = compare(quantity(p_0=WORSE, p_2=marginal, p_4=CLOSE))[2.0]
    assert alone.p_value == among.p_value
    assert among.holm == pytest.approx(2 * (alone.holm or 0))
    assert (alone.verdict, among.verdict) == ("better", "not told apart")


def test_words_hold_the_size_of_the_effect() -> None:
    words = compare(quantity(p_0=WORSE, p_4=BETTER))[4.0].words
    assert words == (
        "p = 4: better. 0.703 instead of 0.503 at p = 0, which is +0.200 [+0.175, +0.225], d_z = 20.0, 3 seeds; "
        "P-value below 0.001."
    )


@pytest.mark.parametrize(
    ("usual", "values", "expected"),
    [
        ([0.5], [0.9], "p = 4: no claim from one seed. 0.900 instead of 0.500 at p = 0, which is +0.400."),
        (
            [0.5, 0.6],
            [0.7, 0.8],
            "p = 4: not told apart. 0.750 instead of 0.550 at p = 0, which is +0.200 on all 2 seeds alike, of which "
            "only the sign is tested; P-value 0.500.",
        ),
        (
            [1.0] * 3,
            [1.0] * 3,
            "p = 4: not told apart. 1 instead of 1 at p = 0, which is 0 on all 3 seeds alike, of which only the sign "
            "is tested; P-value 1.000.",
        ),
        ([0.5, 0.6], [math.nan, 0.7], "p = 4: not compared. A run ended without a finite value."),
        ([0.5, 0.6], [math.inf, 0.7], "p = 4: not compared. A run ended without a finite value."),
        ([], [0.7], "p = 4: not compared. No seed is finished both here and at p = 0."),
    ],
)
def test_words_where_the_data_say_little(usual: list[float], values: list[float], expected: str) -> None:
    found = compare(quantity(p_0=usual, p_4=values))[4.0]
    assert found.words == expected
    assert found.verdict == ("not told apart" if "not told apart" in expected else "not compared")
    assert (found.holm is None) == (found.verdict == "not compared")


def test_the_same_difference_on_many_seeds_is_told_apart_by_its_sign() -> None:
    assert compare(quantity(p_0=[0.5] * 6, p_4=[0.7] * 6))[4.0].p_value == 2**-5
    assert compare(quantity(p_0=[0.5] * 6, p_4=[0.7] * 6))[4.0].verdict == "better"


def test_directions() -> None:
    assert [direction_of(name) for name in ("recall", "rouge1", "exact_match")] == [1, 1, 1]
    assert [direction_of(name) for name in ("loss", "head_loss", "perplexity", "empty")] == [-1] * 4
    assert direction_of("gen_len") == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.0, "1,234"),
        (27.34, "27.3"),
        (0.98349, "0.983"),
        (-0.00042, "−0.0004"),
        (0.0017, "0.0017"),
        (60 - 1e-13, "60"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("power", "name"), [(0.5, "0.5"), (4.0, "4"), (-1.0, "-1"), (math.inf, "inf"), (0.0, "0")])
def test_names_of_powers_are_read_back(power: float, name: str) -> None:
    assert power_name(power) == name
    assert float(name) == power


def test_steps_until_reached(tmp_path: Path) -> None:
    """Budget 30, since one run was evaluated no further: what is reached later counts as not reached."""
    curves = {
        (0.0, 0): {0: 0.1, 10: 0.2, 20: 0.3, 30: 0.4, 40: 0.9},
        (0.0, 1): {0: 0.1, 10: 0.2, 30: 0.8},
        (2.0, 0): {0: 0.1, 10: 0.9, 20: 0.3, 30: 0.5},
        (2.0, 1): {0: 0.8, 10: 0.9, 20: 0.9, 30: 0.9},
    }
    runs = {
        Cell(power, seed, tmp_path): {step: {"recall": value, "loss": 1 - value} for step, value in curve.items()}
        for (power, seed), curve in curves.items()
    }
    recall, steps, loss = quantities(runs, "recall", 0.8)
    assert recall.values == {0.0: {0: 0.9, 1: 0.8}, 2.0: {0: 0.5, 1: 0.9}}
    assert (loss.title, loss.direction) == ("loss", -1)
    assert steps.title == "steps until recall ≥ 0.8"
    assert steps.values == {0.0: {0: 30, 1: 30}, 2.0: {0: 10, 1: 1}}
    assert steps.bounds == {(0.0, 0)}
    assert (steps.budget, steps.direction) == (30, -1)
    assert "(runs that took longer than 30 count as that: 0 of 2, at p = 0 1 of 2)" in compare(steps)[2.0].words
    _, falling, *_ = quantities(runs, "loss", 0.25)
    assert falling.title == "steps until loss ≤ 0.25"
    assert falling.values == steps.values


# ---- cells


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that takes no time; run by Python itself."""
    monkeypatch.setattr(compare_powers, "LAUNCHER", (sys.executable,))
    path = tmp_path / "stub_recipe.py"
    path.write_text(STUB, encoding="utf-8")
    return path


@pytest.fixture
def flags(stub: Path, tmp_path: Path) -> list[str]:
    grid = ["--powers", "0", "1", "inf", "--seeds", "0", "1", "2"]
    return [str(stub), *grid, "--metric", "recall", "--output_dir", str(tmp_path / "out")]


def starts(output_dir: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text().splitlines()) for path in output_dir.glob("*/starts")}


def summary_of(output_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output_dir / "summary.json").read_text("utf-8"))
    return found


def test_a_comparison_from_beginning_to_end(flags: list[str], tmp_path: Path, capfd: Any) -> None:
    assert main([*flags, "--reach", "0.55"]) == 0
    output_dir = tmp_path / "out"
    assert starts(output_dir) == {f"p{power}_seed{seed}": 1 for power in ("0", "1", "inf") for seed in (0, 1, 2)}
    summary = summary_of(output_dir)
    assert summary["powers"] == [0, 1, "inf"]
    assert summary["seeds"] == [0, 1, 2]
    assert {cell["state"] for cell in summary["cells"]} == {"finished"}
    assert [each["title"] for each in summary["quantities"]] == [
        "recall", "steps until recall ≥ 0.55", "loss", "loss, first quarter", "loss, last quarter", "generated tokens",
    ]  # fmt: skip
    usual, one, last = summary["quantities"][0]["by_power"]
    assert usual["values"] == pytest.approx({"0": 0.5, "1": 0.52, "2": 0.49})
    assert "against_0" not in usual
    assert one["against_0"]["difference"] == pytest.approx(0.101)
    assert one["against_0"]["verdict"] == "better"
    assert last["power"] == "inf"
    assert last["against_0"]["holm"] <= 1
    assert summary["environment"]["versions"].keys() >= {"torch", "transformers"}
    assert summary["quantities"][1]["by_power"][0]["not_reached"] == [0, 1, 2]
    report = (output_dir / "summary.md").read_text("utf-8")
    words = one["against_0"]["words"]
    assert report.index(words) < report.index("| p ") < report.index("![") < report.index("## How it was made")
    for name in ("metric_by_power.png", "loss_by_position.png", "curves.png"):
        assert f"]({name})" in report
        assert (output_dir / name).read_bytes().startswith(b"\x89PNG")
    assert "All 9 cells are finished." in report
    assert "| > 30 " in report
    assert words in capfd.readouterr().out


def test_finished_cells_are_kept_and_others_added(flags: list[str], tmp_path: Path) -> None:
    assert main(flags) == 0
    assert main([*flags, "--seeds", "0", "1", "2", "3", "--powers", "0", "2", "inf"]) == 0
    counts = starts(tmp_path / "out")
    assert set(counts.values()) == {1}
    assert {"p2_seed0", "p0_seed3", "p1_seed0"} <= counts.keys()
    assert summary_of(tmp_path / "out")["powers"] == [0, 2, "inf"]


def test_a_failed_cell_leaves_the_others_alone(flags: list[str], tmp_path: Path, capfd: Any) -> None:
    assert main([*flags, "--fail", "p1_seed1"]) == 1
    output = capfd.readouterr()
    log = tmp_path / "out" / "p1_seed1" / "log.txt"
    assert f"p1_seed1 failed with exit status 3: {log}" in output.out
    assert "the cell's last words" in output.out
    assert "the cell's last words" in log.read_text("utf-8")
    assert sum(starts(tmp_path / "out").values()) == 9
    report = (tmp_path / "out" / "summary.md").read_text("utf-8")
    assert "Not finished, 1 of 9 cells: p = 1 with seed 1 (failed with exit status 3)." in report
    (failed,) = [cell for cell in summary_of(tmp_path / "out")["cells"] if cell["state"] != "finished"]
    assert failed == {"power": 1, "seed": 1, "folder": "p1_seed1", "state": "failed", "exit_status": 3}
    against = summary_of(tmp_path / "out")["quantities"][0]["by_power"][1]["against_0"]
    assert against["seeds"] == [0, 2]
    assert main([*flags, "--fail", "p1_seed1", "--max_parallel", "0"]) == 1
    assert "p = 1 with seed 1." in (tmp_path / "out" / "summary.md").read_text("utf-8")
    assert starts(tmp_path / "out")["p1_seed1"] == 1


def test_a_comparison_that_cannot_work_ends_with_its_first_cell(flags: list[str], tmp_path: Path, capfd: Any) -> None:
    assert main([*flags, "--no_such_flag", "3"]) == 1
    output = capfd.readouterr()
    assert "unrecognized arguments: --no_such_flag 3" in output.out
    assert "No cell has come to its end yet, so no other is started." in output.out
    assert [path.name for path in (tmp_path / "out").glob("p*")] == ["p0_seed0"]
    assert not (tmp_path / "out" / "summary.md").exists()


def test_a_wrong_metric_is_told_after_the_first_cell(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metric='recal' is not among what p0_seed0 measured: gen_len, head_loss"):
        main([*flags, "--metric", "recal"])
    assert len(starts(tmp_path / "out")) == 1
    assert main(flags) == 0


def test_cells_run_side_by_side(flags: list[str], tmp_path: Path) -> None:
    """The first cells wait for a file that is made when two have begun, and no third one has by then."""
    go = tmp_path / "go"
    both = compare_powers.start
    begun: list[str] = []

    def start(comparison: Any, cell: Cell) -> Any:
        begun.append(cell.name)
        if len(begun) == 2:
            assert not go.exists()
            go.touch()
        return both(comparison, cell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_powers, "start", start)
        assert main([*flags, "--wait", str(go), "--max_parallel", "2"]) == 0
    assert begun[:2] == ["p0_seed0", "p1_seed0"]
    assert set(starts(tmp_path / "out").values()) == {1}


def test_cells_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("HF_TEMPORAL_CORES", raising=False)
    shared = cell_environment(3)
    assert (shared["OMP_NUM_THREADS"], shared["HF_TEMPORAL_CORES"]) == ("1", "2")
    assert cell_environment(20)["HF_TEMPORAL_CORES"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    shared = cell_environment(3)
    assert (shared["OMP_NUM_THREADS"], shared["HF_TEMPORAL_CORES"]) == ("5", "5")


# ---- interruption


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def pid_of(output_dir: Path, name: str) -> int:
    return int((output_dir / name / "starts").read_text().split()[0])


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.fixture
def _as_at_a_terminal() -> Iterator[None]:
    """Nothing is ignored, as it is where the tests themselves run under `nohup` or in the background."""
    usual: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    usual[signal.SIGINT] = signal.default_int_handler
    before = {each: signal.signal(each, handler) for each, handler in usual.items()}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("_as_at_a_terminal")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_interrupts_the_comparison_ends_its_cells(
    flags: list[str], tmp_path: Path, how: signal.Signals, capfd: Any
) -> None:
    output_dir, names = tmp_path / "out", ("p0_seed0", "p1_seed0")

    def interrupt() -> None:
        wait_until(lambda: all((output_dir / name / "starts").exists() for name in names))
        time.sleep(0.2)
        os.kill(os.getpid(), how)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main([*flags, "--max_parallel", "2", "--wait", str(tmp_path / "go")]) == 130
    thread.join()
    assert "the same command goes on from here" in capfd.readouterr().err
    assert not any(is_alive(pid_of(output_dir, name)) for name in names)
    assert not list(output_dir.glob("*/all_results.json"))
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending({}):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_killed_and_continued_runs_no_cell_twice_at_a_time(
    flags: list[str],
    tmp_path: Path,
    child_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    """The cell that outlives the killed comparison is waited for by the next one, which then does the rest."""
    output_dir, go = tmp_path / "out", tmp_path / "go"
    flags = [*flags, "--wait", str(go)]
    killed = subprocess.Popen([sys.executable, "-c", LAUNCHED_DIRECTLY, *flags], env=child_environment)
    wait_until((output_dir / "p0_seed0" / "starts").exists)
    killed.kill()
    killed.wait()
    assert is_alive(pid_of(output_dir, "p0_seed0"))
    begin, tries = compare_powers.start, []

    def start(comparison: Any, cell: Cell) -> Any:
        process = begin(comparison, cell)
        tries.append((cell.name, process is not None))
        if len(tries) == 3:
            go.touch()
        return process

    monkeypatch.setattr(compare_powers, "start", start)
    assert main(flags) == 0
    assert tries[:3] == [("p0_seed0", False)] * 3
    assert capfd.readouterr().out.count("p0_seed0 is still being run by a process of an earlier comparison") == 1
    assert set(starts(output_dir).values()) == {1}
    assert len(starts(output_dir)) == 9


def test_a_cell_that_was_killed_is_started_again(flags: list[str], tmp_path: Path) -> None:
    """What it left is left in place, for the recipe to go on from."""
    folder = tmp_path / "out" / "p0_seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoint-2").mkdir()
    (folder / "log.txt").write_text("of the first time\n")
    assert main([*flags, "--powers", "0", "1"]) == 0
    assert (folder / "checkpoint-2").is_dir()
    log = (folder / "log.txt").read_text("utf-8")
    assert log.startswith("of the first time\n$ accelerate launch ")
    with (folder / "log.txt").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- the command line


def test_dry_run_prints_commands_that_run(flags: list[str], tmp_path: Path, capsys: Any) -> None:
    """In a shell, with whatever `accelerate` is there."""
    assert main([*flags, "--powers", "0"]) == 0
    capsys.readouterr()
    config = tmp_path / "a config.yaml"
    config.touch()
    (tmp_path / "out").rename(tmp_path / "out put")
    grid = [*flags[:-1], str(tmp_path / "out put"), "--powers", "0", "-0.5", "inf"]
    assert main([*grid, "--dry_run"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 6
    assert not (tmp_path / "out put" / "p-0.5_seed0").exists()
    assert all(command.startswith("accelerate launch ") for command in commands)
    stand_in = tmp_path / "bin" / "accelerate"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} "$@"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    subprocess.run("\n".join(commands), shell=True, env=environment, check=True, executable="/bin/bash")
    assert main([*grid, "--max_parallel", "0"]) == 0
    assert set(starts(tmp_path / "out put").values()) == {1}


def test_the_command_of_a_cell(stub: Path, tmp_path: Path) -> None:
    config, accelerate = tmp_path / "small config.yaml", tmp_path / "cpu.yaml"
    config.write_text("max_steps: 3\n")
    accelerate.write_text("use_cpu: true\n")
    argv = ["--learning_rate", "-1e-3", "--config", str(config), str(stub), "--names", "a b", "c", "--metric", "loss"]
    argv += ["--powers", "-1", "0", "1e-07", "--seeds", "7", "--output_dir", "o", "--use_peft"]
    argv += ["--accelerate_config", str(accelerate)]
    comparison = read_arguments(argv)
    assert comparison.overrides == ["--learning_rate", "-1e-3", "--names", "a b", "c", "--use_peft"]
    assert shlex.split(comparison.shown(comparison.cells()[2])) == [
        *("accelerate", "launch", "--config_file", str(accelerate), str(stub), "--config", str(config)),
        *("--learning_rate", "-1e-3", "--names", "a b", "c", "--use_peft"),
        *("--temporal_power=1e-07", "--seed=7", "--output_dir=o/p1e-07_seed7"),
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--powers", "1", "2"], r"powers=\[1\.0, 2\.0\] lacks 0, which every other p is tested against"),
        (["--powers", "0", "nan"], r"power=nan is out of range"),
        (["--powers", "0", "1", "1.0"], r"powers=\[0\.0, 1\.0, 1\.0\] has one twice"),
        (["--powers", "0", "-0.0"], r"has one twice"),
        (["--seeds", "3", "3"], r"seeds=\[3, 3\] has one twice"),
        (["--max_parallel", "-1"], r"max_parallel=-1 is negative"),
        (["--seed", "3"], r"--seed cannot be given to every cell; accepted: --seeds"),
        (["--temporal-power=3"], r"--temporal_power cannot be given to every cell; accepted: --powers"),
        (
            ["--hub_token=hf_secret"],
            r"--hub_token cannot be given to every cell; accepted: the environment's HF_TOKEN",
        ),
        (["--metric", "eval_temporal_loss"], r"metric='temporal_loss' is weighted by each p itself"),
        (["--metric", "gen_len", "--reach", "3"], r"of gen_len neither more nor less is better"),
        (["--config", "nowhere.yaml"], r"'nowhere.yaml' is no file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    flags: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        main([*flags, *more])
    assert "hf_secret" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    argv = ["--powers", "0", "1", "--seeds", "0", "--metric", "loss", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"recipe='nowhere.py' is no file"):
        main(["nowhere.py", *argv])


def test_another_comparison_does_not_go_on_in_the_same_folder(flags: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_steps: 3  # first\n")
    flags = [*flags, "--powers", "0", "--seeds", "0", "--config", str(config)]
    assert main([*flags, "--dry_run"]) == 0
    assert main([*flags, "--gain", "0.2"]) == 0  # nothing had run yet, so nothing is bound to be the same
    with pytest.raises(
        ValueError, match=r"overrides=\['--gain', '0\.3'\], but output_dir=.*'0\.2'.*another output_dir"
    ):
        main([*flags, "--gain", "0.3"])
    config.write_text("max_steps: 3  # second\n")
    assert main([*flags, "--gain", "0.2"]) == 0
    config.write_text("max_steps: 4\n")
    with pytest.raises(
        ValueError, match=r"config=\{'max_steps': 4\}, but output_dir=.* with config=\{'max_steps': 3\}"
    ):
        main([*flags, "--gain", "0.2"])


# ---- the real thing


def test_a_recipe_launched_for_real(tiny: Tiny, tmp_path: Path, child_environment: dict[str, str]) -> None:
    output_dir = tmp_path / "out"
    script = Path(finetune_causal_lm.__file__)
    recipe_flags = tiny.flags(output_dir, "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1")
    position = recipe_flags.index("--output_dir")
    del recipe_flags[position : position + 2]
    command = [
        *(sys.executable, str(script.parent / "compare_powers.py"), str(script), *recipe_flags),
        *("--powers", "0", "4", "--seeds", "1", "--metric", "rouge1", "--output_dir", str(output_dir)),
        *("--accelerate_config", str(script.parent / "accelerate" / "cpu.yaml"), "--max_parallel", "2"),
    ]
    run = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert "p = 4: no claim from one seed." in run.stdout
    usual, four = summary_of(output_dir)["cells"]
    assert (usual["step"], four["step"]) == (2, 2)
    assert usual["metrics"]["loss"] != four["metrics"]["loss"]
    assert "generated tokens" in (output_dir / "summary.md").read_text("utf-8")
