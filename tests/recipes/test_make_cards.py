"""The cards in `model_cards/`: their code still finds what it imports, and their command is there to be run again."""

from __future__ import annotations

import ast
import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import make_cards

CARDS = sorted((make_cards.ROOT / "model_cards").glob("*/README.md"))
CONFIGS = {name: make_cards.ROOT / "recipes" / "configs" / f"{name}.yaml" for name in make_cards.NAMES}


def name_of(card: Path) -> str:
    return card.parent.name


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_imports_of_a_card_work(card: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", card.read_text("utf-8"), re.DOTALL | re.MULTILINE))
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    for node in imports:
        exec(compile(ast.Module([node], []), card.parent.name, "exec"), {})


def test_old_names_of_published_cards_are_the_new_modules() -> None:
    old, new = import_module("hf_temporal.tasks.embedded_model"), import_module("hf_temporal.data.embedded_model")
    assert old.embedded_model_folder is new.embedded_model_folder
    old, new = import_module("hf_temporal.profile"), import_module("hf_temporal.evaluation")
    assert old.load_profiles is new.load_profiles


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_a_folder_holds_the_card_and_the_pictures_that_it_shows(card: Path) -> None:
    pictures = make_cards.PICTURE.findall(card.read_text("utf-8"))
    assert 1 <= len(pictures) <= 2
    assert sorted(path.name for path in card.parent.iterdir()) == sorted(["README.md", *pictures])


def test_each_card_has_its_configuration_which_opens_with_its_command() -> None:
    folders = []
    for config in CONFIGS.values():
        command = make_cards.command_of(config)
        relative = config.relative_to(make_cards.ROOT).as_posix()
        assert command[command.index("--config") + 1] == relative
        assert all((make_cards.ROOT / part).is_file() for part in command if part.endswith((".py", ".yaml")))
        folders.append(Path(yaml.safe_load(config.read_text("utf-8"))["output_dir"]).name)
        assert f"--config {relative}" in (make_cards.ROOT / "model_cards" / folders[-1] / "README.md").read_text(
            "utf-8"
        )
    assert sorted(folders) == [name_of(card) for card in CARDS]


def test_a_card_is_copied_with_its_pictures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the run: a folder that it left behind, with a picture more than the card shows."""
    config = tmp_path / "recipes" / "configs" / "some" / "run.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(
        "#   accelerate launch recipes/run.py \\\n#       --config run.yaml\noutput_dir: outputs/run\n", "utf-8"
    )
    outputs = tmp_path / "outputs" / "run"
    outputs.mkdir(parents=True)
    for name in ("one.png", "two.png"):
        (outputs / name).write_bytes(b"")
    (outputs / "README.md").write_text("![A picture](two.png)\n", "utf-8")
    commands: list[Any] = []
    monkeypatch.setattr(make_cards, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    folder = make_cards.make_card("some/run")
    assert commands[0][-4:] == ["accelerate.commands.launch", "recipes/run.py", "--config", "run.yaml"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "two.png"]


def test_a_configuration_without_its_command_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("task: copying\n", "utf-8")
    with pytest.raises(ValueError, match=r"run\.yaml opens without its command; accepted: # accelerate launch"):
        make_cards.command_of(config)
