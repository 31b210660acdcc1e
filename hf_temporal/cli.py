"""The command `hf-temporal`: the recipes, launched through accelerate, without a clone of the repository."""

import argparse
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_temporal.errors import PROGRAM_VARIABLE, in_one_line, is_users_mistake
from hf_temporal.installed import config_path, engine_path, nearest, recipes, require

HELP = """usage: hf-temporal COMMAND [--config FILE_OR_NAME] [--name value ...]

Fine-tune a model, each target token's loss weighted by t^p:

  finetune-causal-lm   a decoder-only model
  finetune-seq2seq     an encoder–decoder
  suggest [COMMAND]    the same flags: train nothing, tell what each p would do with the model and the data
  compare COMMAND      every p with every seed, each p tested against p = 0

hf-temporal COMMAND --help lists the flags of a command. Options of `accelerate launch`, such as --num_processes, go
among them; --accelerate_config is a file or one of cpu, ddp, ddp_cpu, fsdp2, deepspeed_zero2, deepspeed_zero3.

On a CPU, for a first look:

  hf-temporal finetune-causal-lm --config summarization/smollm2_lora_docstrings --max_steps 2 --max_eval_samples 4
"""
RECIPES = {"finetune-causal-lm": "finetune_causal_lm.py", "finetune-seq2seq": "finetune_seq2seq.py"}
COMMANDS = (*RECIPES, "suggest", "compare")
# Flags of a recipe that are options of `accelerate launch`, too: the recipe's. The rest names a script, not ours.
NOT_OF_THE_LAUNCHER = ("debug", "gradient_accumulation_steps", "help", "config_file", "module", "no_python")
OF_SEQ2SEQ = ("encoder_model_name_or_path", "predict_with_generate", "generation_max_length", "generation_num_beams")
KIND_SETTINGS = ("model_name_or_path", "model_revision", "model_type", *OF_SEQ2SEQ)


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command; the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    command, *flags = argv
    try:
        _check_name(command, COMMANDS)
        require("recipes")
        if command == "suggest":
            return _suggest(flags)
        if command == "compare":
            return _compare(flags)
        return _launch(command, flags)
    except (ModuleNotFoundError, ValueError) as error:
        if not is_users_mistake(error):
            raise
        print(f"hf-temporal: {in_one_line(error)}", file=sys.stderr)
        return 2


def _check_name(given: str, names: Sequence[str]) -> None:
    if given not in names:
        raise ValueError(
            f"{given!r} is no command; accepted: {', '.join(names)}; the nearest is {nearest(given, names)!r}"
        )


def _launch(command: str, flags: Sequence[str], program: str | None = None) -> int:
    """Run a recipe as `accelerate launch` does, in this interpreter's environment; `program` is what was typed."""
    script = str(recipes() / RECIPES[command])
    program = program or f"hf-temporal {command}"
    if _asks_for_help(flags):
        recipe = runpy.run_path(script)
        sys.argv[0] = program
        recipe["main"](["--help"])  # argparse ends the program
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    note = "The following values were not passed to `accelerate launch`"
    logging.getLogger("accelerate.commands.launch").addFilter(lambda record: note not in record.getMessage())
    parser = launch_command_parser()
    parser.exit_on_error = False
    of_launcher, of_recipe = split_flags(flags, parser)
    os.environ[PROGRAM_VARIABLE] = program
    try:
        launch_command(parser.parse_args([*of_launcher, script, *of_recipe]))
    except subprocess.CalledProcessError as error:  # the recipe has printed what was wrong
        return error.returncode if error.returncode > 0 else 1
    except ChildFailedError:
        return 1
    except (argparse.ArgumentError, ImportError, OSError, ValueError) as error:  # an option that accelerate refuses
        raise ValueError(f"accelerate launch: {error}") from error
    return 0


def split_flags(flags: Sequence[str], parser: Any) -> tuple[list[str], list[str]]:
    """The flags for `accelerate launch`, whose parser is given, and those for the recipe."""
    takes_value = {
        option: action.nargs != 0
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option[2:].replace("-", "_") not in NOT_OF_THE_LAUNCHER
    }
    of_launcher, of_recipe = [], []
    words = iter(flags)
    for word in words:
        name, has_value, value = word.partition("=")
        if name in ("--accelerate_config", "--accelerate-config"):
            of_launcher += ["--config_file", str(engine_path(value if has_value else next(words, "")))]
        elif name in takes_value:
            of_launcher += [word, *([next(words, "")] if takes_value[name] and not has_value else [])]
        else:
            of_recipe.append(word)
    return of_launcher, of_recipe


def _suggest(flags: Sequence[str]) -> int:
    """The recipe that is named, or found from the model, with `--suggest_power`."""
    if flags and not flags[0].startswith("-"):
        command, *flags = flags
        _check_name(command, tuple(RECIPES))
    else:
        command = "finetune-seq2seq" if is_seq2seq(settings_among(flags)) else "finetune-causal-lm"
    return _launch(command, [*flags, "--suggest_power"], "hf-temporal suggest")


def settings_among(flags: Sequence[str]) -> dict[str, str]:
    """What flags and `--config` say about which model it is; flags win."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", *KIND_SETTINGS):
        reader.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest=name, nargs="?", const="true")
    given = {name: value for name, value in vars(reader.parse_known_args(flags)[0]).items() if value}
    settings: Any = {}
    if "config" in given:
        path = config_path(given["config"])
        import yaml

        with suppress(OSError, ValueError, yaml.YAMLError):  # the recipe says what is wrong with it
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    merged = {**(settings if isinstance(settings, dict) else {}), **given}
    return {name: str(value) for name, value in merged.items() if name in KIND_SETTINGS and value}


def is_seq2seq(settings: Mapping[str, str]) -> bool:
    """Whether the model is an encoder–decoder; False if its configuration cannot be read: the recipe reports it."""
    if not settings.keys().isdisjoint(OF_SEQ2SEQ):  # flags that the recipe for decoder-only models does not have
        return True
    from transformers import AutoConfig

    with suppress(OSError, ValueError):
        if "model_type" in settings:
            return bool(AutoConfig.for_model(settings["model_type"]).is_encoder_decoder)
        if "model_name_or_path" in settings:
            revision = settings.get("model_revision", "main")
            config = AutoConfig.from_pretrained(settings["model_name_or_path"], revision=revision)
            return bool(config.is_encoder_decoder)
    return False


def _compare(flags: Sequence[str]) -> int:
    """`hf_temporal.compare`, the recipe's name and those of configurations as paths."""
    from hf_temporal.compare.main import main as compare

    program = "hf-temporal compare"
    if not flags or _asks_for_help(flags):
        return compare(["--help"], program=program)
    words = list(flags)
    if not words[0].startswith("-") and not Path(words[0]).is_file():
        _check_name(words[0], tuple(RECIPES))
        words[0] = os.path.relpath(recipes() / RECIPES[words[0]])
    path_of = {"--config": config_path, "--accelerate_config": engine_path}
    for place, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if name in path_of and has_value:
            words[place] = f"{name}={os.path.relpath(path_of[name](value))}"
        elif name in path_of and place + 1 < len(words):
            words[place + 1] = os.path.relpath(path_of[name](words[place + 1]))
    return compare(words, program=program)


def _asks_for_help(flags: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(flags)


if __name__ == "__main__":
    sys.exit(main())
