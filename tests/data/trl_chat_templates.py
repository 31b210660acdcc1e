"""The chat templates that TRL's package ships, read from its files."""

from __future__ import annotations

from importlib import resources, util

from tests.data.chat_templates import Family

_ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>", "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>", "gemma": "<end_of_turn>", "glm": "", "gptoss": "<|return|> <|call|>",
    "idefics": "<end_of_utterance>", "smolvlm": "<end_of_utterance>", "llama3": "<|eot_id|> <|eom_id|>",
    "llava": "</s>", "muse": "<|eot|>", "phi3": "<|end|>",
}  # fmt: skip
_PARTS = ("idefics3", "smolvlm", "llava_next")
_EITHER = (
    "diffusion_gemma", "gemma3", "gemma4", "glm4moe", "lfm2_2_5", "muse", "qwen2_5_vl", "qwen3_5", "qwen3_6",
    "qwen3_8", "qwen3_vl",
)  # fmt: skip


def trl_families() -> list[Family]:
    """The templates among the files of TRL's package, without its variants for training; none without TRL."""
    if util.find_spec("trl") is None:
        return []
    families = []
    for file in sorted(resources.files("trl").joinpath("chat_templates").iterdir(), key=lambda each: each.name):
        name = file.name.removesuffix(".jinja")
        if name == file.name or name.endswith("_training"):
            continue
        ends = next((end for start, end in _ENDS.items() if name.startswith(start)), "<|im_end|>").split()
        eos = "<|endoftext|>" if not ends or name.startswith("phi") else ends[0]
        content = "parts" if name in _PARTS else "either" if name.startswith(_EITHER) else "string"
        refuses = name.startswith(("deepseek", "nemotron", "qwen3_5_think", "qwen3_6", "qwen3_8"))
        families.append(
            Family(f"trl-{name}", file.read_text("utf-8"), None, tuple(ends), eos, content=content, calls=True,
                   thinks=True, refuses_plain=refuses)
        )  # fmt: skip
    return families


FAMILIES = trl_families()
