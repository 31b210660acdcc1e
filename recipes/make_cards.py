"""Write the cards in `model_cards/` again (`make cards`), for the configurations that need no model hub.

The command at the top of each configuration is run: a finished run is only reported, any other is trained or goes on.
Then its card and the pictures of the card are copied.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "summarization/smollm2_lora_docstrings",
    "summarization/t5_small_docstrings",
    "copying/small_llama",
    "copying/small_t5",
    "copying/smollm2_lora",
)
PICTURE = re.compile(r"!\[[^]]*\]\(([^)]+\.png)\)")
COMMAND = re.compile(r"#\s+accelerate (launch (?:\\\n#|.)*)")


def command_of(config: Path) -> list[str]:
    """What follows `accelerate launch` in the comment at the top of a configuration, or a `ValueError`."""
    found = COMMAND.search(config.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{config.name} opens without its command; accepted: # accelerate launch …")
    return shlex.split(found[1].replace("\\\n#", " "))[1:]


def make_card(name: str) -> Path:
    """Run a configuration to its end, copy its card and the card's pictures, and return the folder of the copy."""
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *command_of(config)], cwd=ROOT, check=True)
    output_dir = ROOT / yaml.safe_load(config.read_text(encoding="utf-8"))["output_dir"]
    folder = ROOT / "model_cards" / output_dir.name
    folder.mkdir(parents=True, exist_ok=True)
    for each in ("README.md", *PICTURE.findall((output_dir / "README.md").read_text(encoding="utf-8"))):
        shutil.copy(output_dir / each, folder)
    return folder


if __name__ == "__main__":
    for name in NAMES:
        print(f"Made {make_card(name).relative_to(ROOT)}")
