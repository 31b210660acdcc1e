"""README.md and docs/: every code block runs, every link leads somewhere, every flag of a command exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from torch import Tensor, nn

from hf_temporal import TemporalTrainingArguments, TemporalWeighting, TemporalWeightTrainer
from hf_temporal.compare.main import read_arguments
from hf_temporal.finetuning.configuration import parse
from tests.recipes.test_configs import CAUSAL, SEQ2SEQ
from tests.test_repository import PROJECT

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
ENGINES = ROOT / "recipes" / "accelerate"
KINDS = {"finetune-causal-lm": CAUSAL, "finetune-seq2seq": SEQ2SEQ}
SCRIPTS = {name: ROOT / "recipes" / f"{name.replace('-', '_')}.py" for name in KINDS}
HAS_COMMAND = "hf-temporal" in PROJECT.get("scripts", {})

REPOSITORY = re.compile(
    r"https://(?:github\.com/OWNER/hf_temporal/(?:blob|tree)|raw\.githubusercontent\.com/OWNER/hf_temporal)/main/"
)
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
LINKED = PAGES | {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.glob("recipes/**/README.md"))}
LANGUAGES = {"bash", "csv", "diff", "jsonl", "python"}


class Block(NamedTuple):
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found]


def python_of(page: Path) -> str:
    return "\n".join(block.code for block in blocks(page) if block.language == "python")


# ---- code


@pytest.mark.parametrize("name", PAGES)
def test_every_block_says_what_it_is(name: str) -> None:
    page = PAGES[name]
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert 2 * len(blocks(page)) == page.read_text("utf-8").count("```")


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if python_of(page)])
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    exec(compile(python_of(PAGES[name]), name, "exec"), {"__name__": "page"})


def test_the_diff_turns_a_usual_script_into_the_one_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = blocks(PAGES["README.md"])
    (diff,) = (block.code for block in readme if block.language == "diff")
    weighted = next(block.code for block in readme if block.language == "python")
    removed, added = ([line[1:] for line in diff.splitlines() if line.startswith(sign)] for sign in "-+")
    usual = weighted
    for old, new in zip(removed, added, strict=True):
        assert usual.count(f"{new}\n") == 1
        usual = usual.replace(f"{new}\n", f"{old}\n")
    assert "emporal" not in usual
    monkeypatch.chdir(tmp_path)
    for script, power in ((usual, None), (weighted, 2.0)):
        names: dict[str, Any] = {"__name__": "script"}
        exec(compile(script, "script", "exec"), names)
        assert names["trainer"].state.global_step == 20
        assert getattr(names["trainer"], "temporal_power", None) == power


# ---- links


def heading_anchors(page: Path) -> set[str]:
    """What GitHub makes of headings: small letters, no punctuation, hyphens for spaces."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page: Path) -> Iterator[tuple[str, Path]]:
    """The links into the repository, with the file or folder that each means."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.partition("#")[0]
        if in_repository := REPOSITORY.match(target):
            yield link, ROOT / target[in_repository.end() :]
        elif not link.startswith("https://"):
            yield link, page.parent / target if target else page


@pytest.mark.parametrize("name", LINKED)
def test_every_link_leads_somewhere(name: str) -> None:
    for link, target in links_of(LINKED[name]):
        assert target.exists(), link
        if "#" in link:
            assert link.partition("#")[2] in heading_anchors(target), link


def test_links_of_the_readme_work_on_pypi() -> None:
    """There it stands alone, so that relative links would lead nowhere; its pictures are raw files."""
    links = re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", PAGES["README.md"].read_text("utf-8"))
    for picture, link in links:
        assert link.startswith("https://raw.githubusercontent.com/" if picture else "https://"), link
        assert "OWNER" not in link or REPOSITORY.match(link), link


@pytest.mark.parametrize("name", PAGES)
def test_named_tests_are_there(name: str) -> None:
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", PAGES[name].read_text("utf-8")):
        assert f"def {test}(" in sources, test


# ---- commands


def commands_of(page: Path) -> list[str]:
    """Each command of the bash blocks in one line, without what stands in front of it."""
    text = "\n".join(block.code for block in blocks(page) if block.language == "bash").replace("\\\n", " ")
    flags = r"(?:'[^'\n]*'|[^\n'#])*"
    return re.findall(rf"(hf-temporal \w{flags}|recipes/finetune_\w+\.py{flags})", re.sub(r"pip install.*", "", text))


COMMANDS = [(name, command) for name, page in PAGES.items() for command in commands_of(page)]


def launched(argv: Sequence[str], kinds: Sequence[Any]) -> list[str]:
    """What is left of the flags for the command itself, once accelerate has had its own."""
    own = {f"--{each.name}" for kind in kinds for each in fields(kind)}
    of_launcher = {
        option: action.nargs != 0
        for action in launch_command_parser()._actions
        for option in action.option_strings
        if option not in own
    }
    left, words = [], iter(argv)
    for word in words:
        if word == "--accelerate_config":
            assert (ENGINES / f"{next(words)}.yaml").is_file()
        elif word in of_launcher:
            if of_launcher[word]:
                next(words)
        else:
            left.append(word)
    return left


def with_files(argv: Sequence[str], folder: Path) -> list[str]:
    """The flags, with the path of a configuration in place of its name; files of data are made."""
    argv = list(argv)
    for place, (flag, value) in enumerate(pairwise(argv)):
        if flag == "--config":
            argv[place + 1] = str(CONFIGS / f"{value}.yaml")
            assert Path(argv[place + 1]).is_file(), value
        elif flag in ("--train_file", "--validation_file"):
            (folder / value).write_text("article,highlights\na,b\n", encoding="utf-8")
    return argv


def check_comparison(argv: Sequence[str], folder: Path) -> None:
    kind, *flags = argv
    comparison = read_arguments([str(SCRIPTS[kind]), *with_files(flags, folder)])
    for combination in comparison.combinations():
        settings = ["--config", str(combination.arguments.config), *combination.overrides]
        names = {name for each in parse(KINDS[kind], settings) for name in vars(each)}
        assert set(combination.values) <= names


@pytest.fixture
def _as_if_there_were_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.usefixtures("_as_if_there_were_a_gpu")
@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=lambda value: value[:60])
def test_flags_of_commands_exist(name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del name
    monkeypatch.chdir(tmp_path)
    program, *argv = shlex.split(command)
    if program != "hf-temporal":
        argv.insert(0, Path(program).stem.replace("_", "-"))
    elif argv[0] == "compare":
        check_comparison(argv[1:], tmp_path)
        return
    elif argv[0] == "suggest":
        argv = argv[1:] if argv[1] in KINDS else ["finetune-causal-lm", *argv[1:]]
    kinds = KINDS[argv[0]]
    parse(kinds, with_files(launched(argv[1:], kinds), tmp_path))


def test_every_command_is_shown() -> None:
    words = {word for _, command in COMMANDS for word in command.split()[1:3]}
    assert {*KINDS, "suggest", "compare"} <= words


@pytest.mark.parametrize("name", PAGES)
def test_targets_of_make_are_there(name: str) -> None:
    code = "\n".join(block.code for block in blocks(PAGES[name]) if block.language == "bash")
    for target in re.findall(r"^make (\S+)", code, re.MULTILINE):
        planned = subprocess.run(["make", target, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "finetune" in planned.stdout if target == "demo" else "pytest" in planned.stdout


@pytest.mark.skipif(not HAS_COMMAND, reason="pyproject.toml does not declare the command yet")
@pytest.mark.parametrize("name", PAGES)
def test_what_is_installed_is_declared(name: str) -> None:
    extras = PROJECT["optional-dependencies"]
    for line in re.findall(r"pip install '([^']+)'", PAGES[name].read_text("utf-8")):
        assert Requirement(re.sub(r"^\.", "hf-temporal", line)).extras <= set(extras), line


# ---- what other libraries divide by


class Zero(nn.Module):
    """Predicts zeros: the absolute errors of the labels are the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.scale * inputs
        return {"logits": logits} if labels is None else {"loss": (logits - labels).abs().mean(), "logits": logits}


BY_COUNT, BY_SUM = (1 * 2 + 3 * 4) / 2, (1 * 2 + 3 * 4) / (1 + 3)


@pytest.mark.parametrize("given", ["loss_weights", "weight_fn"])
@pytest.mark.parametrize(
    ("normalization", "expected"), [("tokens", BY_COUNT), ("batch", BY_SUM), ("sequence", BY_SUM)]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_1_and_3_on_losses_2_and_4(
    given: str, normalization: str, expected: float, accumulation: int, tmp_path: Path
) -> None:
    """The example of docs/weights.md, logged by a step of the trainer; a batch more of the same changes nothing."""
    row = {"inputs": torch.ones(2), "labels": torch.tensor([2.0, 4.0])}
    if given == "loss_weights":
        row["loss_weights"] = torch.tensor([1.0, 3.0])
    weighting = TemporalWeighting(
        0.0,
        normalization=normalization,
        regression_loss="absolute",
        weight_fn=(lambda t, _: 2 * t - 1) if given == "weight_fn" else None,
    )
    trainer = TemporalWeightTrainer(
        Zero(),
        TemporalTrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=[row] * accumulation,
        weighting=weighting,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)
