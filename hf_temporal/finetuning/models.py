"""Loading the model that a recipe trains: from the Hub or a folder, a new one, or an encoder–decoder made of two."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from peft import prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available, logging

import hf_temporal.memory.models  # noqa: F401 - model_type knows the laboratory's families from here on
from hf_temporal.data import argument
from hf_temporal.data.embedded_model import EMBEDDED_MODEL, embedded_model_folder

from .small_models import small_settings

logger = logging.get_logger(__name__)

NEW_IN_A_DECODER = ("crossattention", "enc_to_dec_proj")  # what a warm-started pair has to learn from nothing


@dataclass
class ModelArguments:
    """Which model is trained, and with which adapter, in the names of TRL and Hugging Face's examples."""

    model_name_or_path: str | None = argument(None, "Model on the Hub, or folder; unset: the recipe's own.")
    model_revision: str = argument("main", "Branch, tag or commit of the model on the Hub.")
    tokenizer_name: str | None = argument(None, "Tokenizer on the Hub, or folder; unset: the model's.")
    tokenizer_type: str | None = argument(
        None, "Its kind where its files do not say: bert for T5-PEGASUS's vocab.txt."
    )
    model_type: str | None = argument(None, "Train a model of this kind (llama, t5, ...) from random weights.")
    config_overrides: str | None = argument(
        None, "Its configuration, if not the default: hidden_size=64,vocab_size=16; small: two layers of width 64."
    )
    dtype: str = argument(
        "float32",
        "Of the weights when loaded; auto: bfloat16 under an adapter where the device has it, else float32.",
        ["auto", "bfloat16", "float16", "float32"],
    )
    use_peft: bool = argument(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = argument(8, "Rank of the adapter.")
    lora_alpha: int = argument(16, "The adapter's output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = argument(0.0, "Dropout in front of the adapter.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the modules that get an adapter; all-linear: every linear layer but the LM head."},
    )
    load_in_4bit: bool = argument(False, "Keep the frozen weights under the adapter in 4 bits (NF4).")
    merge_adapter: bool = argument(False, "Save the model with the trained adapter added to its weights.")

    def __post_init__(self) -> None:
        for name in ("load_in_4bit", "merge_adapter"):
            if getattr(self, name) and not self.use_peft:
                raise ValueError(f"{name}=True is about an adapter, and use_peft=False; accepted: both or neither")
        if self.load_in_4bit and self.merge_adapter:
            raise ValueError(
                "load_in_4bit=True and merge_adapter=True: added to 4-bit weights the adapter would be rounded away; "
                "accepted: one of them"
            )
        lora = {
            "lora_r": (self.lora_r >= 1, "a whole number of at least 1"),
            "lora_alpha": (self.lora_alpha > 0, "a number above 0"),
            "lora_dropout": (0 <= self.lora_dropout < 1, "a number from 0 to below 1"),
            "lora_target_modules": (bool(self.lora_target_modules), "one name or more"),
        }
        for name, (fits, what) in lora.items() if self.use_peft else ():
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r}; accepted: {what}")
        if not self.model_type:
            if self.config_overrides:
                raise ValueError(f"config_overrides={self.config_overrides!r} is for a model_type; accepted: with one")
            return
        self.check_unset(f"model_type={self.model_type!r} trains all of a new model", "model_name_or_path", "use_peft")
        self.config_values()

    def check_unset(self, why: str, *names: str) -> None:
        """Raise a `ValueError` where one of these arguments is given."""
        for name in names:
            if getattr(self, name):
                raise ValueError(f"{why}, and {name}={getattr(self, name)!r}; accepted: one of them")

    def config_values(self) -> dict[str, Any]:
        """The values in `config_overrides`, each of the type that the configuration of `model_type` has there.

        "small" stands for those of `small_models.SMALL`; what is given beside it wins.
        """
        try:
            config = AutoConfig.for_model(str(self.model_type))
        except ValueError as error:
            raise ValueError(f"model_type={self.model_type!r}: {error}") from None
        values: dict[str, Any] = {}
        for setting in self.config_overrides.split(",") if self.config_overrides else ():
            if setting.strip() == "small":
                values = small_settings(str(self.model_type)) | values
                continue
            name, _, value = (part.strip() for part in setting.partition("="))
            try:
                config.update_from_string(f"{name}={value}")
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"config_overrides={self.config_overrides!r}: {error}; "
                    f"accepted: name=value,... with names and values of {type(config).__name__}, or small"
                ) from None
            values[config.attribute_map.get(name, name)] = getattr(config, name)
        return values


@dataclass
class Seq2SeqModelArguments(ModelArguments):
    """`ModelArguments`, and the two models of a warm-started encoder–decoder."""

    encoder_model_name_or_path: str | None = argument(None, "Model on the Hub, or folder: the encoder of a new pair.")
    decoder_model_name_or_path: str | None = argument(None, "Its decoder, whose attention to the encoder is new.")

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = (self.encoder_model_name_or_path, self.decoder_model_name_or_path)
        if not any(pair):
            return
        if not all(pair):
            raise ValueError(
                f"encoder_model_name_or_path={pair[0]!r} and decoder_model_name_or_path={pair[1]!r}; "
                "accepted: both or neither"
            )
        made = f"encoder_model_name_or_path={pair[0]!r} makes a new model of two"
        self.check_unset(made, "model_name_or_path", "model_type", "load_in_4bit")
        if self.use_peft and not self.merge_adapter:
            raise ValueError(
                "use_peft=True with encoder_model_name_or_path: an adapter for a pair that is saved nowhere could not "
                "be loaded again; accepted: merge_adapter=True as well, or use_peft=False"
            )


def _from_pretrained(kind: Any, argument: str, name: str, **settings: Any) -> Any:
    """`kind.from_pretrained(name, **settings)`; the error says which argument holds what cannot be loaded."""
    try:
        return kind.from_pretrained(name, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument}={name!r} cannot be loaded: {str(error).strip().partition(chr(10))[0]}; accepted: a folder "
            "with a model of the kind that the recipe trains, or the id of one on the Hub"
        ) from error


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that `arguments` name, without segment ids, which no model here is trained with."""
    argument, name, revision = _source(arguments)
    if arguments.tokenizer_name:
        argument, name, revision = "tokenizer_name", arguments.tokenizer_name, "main"
    settings = {"tokenizer_type": arguments.tokenizer_type, "model_input_names": ["input_ids", "attention_mask"]}
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, argument, name, revision=revision, **settings)
    # of a T5-PEGASUS folder `AutoTokenizer` makes a T5 tokenizer, which finds no file of its own there
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1:
        raise ValueError(
            f"{name!r} holds no vocabulary that {type(tokenizer).__name__} reads; accepted: a tokenizer_type that "
            "fits the files there (bert for a vocab.txt), or another tokenizer_name"
        )
    return tokenizer


def load_causal_lm(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The decoder-only model and its tokenizer, or `tokenizer`; for want of a padding token the end token pads."""
    tokenizer = tokenizer or load_tokenizer(arguments)
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end token; accepted: one with eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = _load(AutoModelForCausalLM, arguments, tokenizer)
    _fit_embedding(model, tokenizer, arguments)
    return model, tokenizer


def load_seq2seq_lm(
    arguments: Seq2SeqModelArguments, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder–decoder and its tokenizer, or `tokenizer`.

    Where the tokenizer is BERT's and the model's end token is not, the model is made to start with [CLS] and to end
    with [SEP], as T5-PEGASUS and warm-started pairs do.
    """
    tokenizer = tokenizer or load_tokenizer(arguments)
    tokens = _special_tokens(tokenizer)
    for role, token, accepted in (("padding", "pad", "pad_token"), ("end", "eos", "eos_token or sep_token")):
        if tokens[f"{token}_token_id"] is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no {role} token; accepted: one with {accepted}"
            )
    is_pair = bool(arguments.encoder_model_name_or_path)
    model = _load_pair(arguments, tokenizer) if is_pair else _load(AutoModelForSeq2SeqLM, arguments, tokenizer)
    _fit_embedding(model, tokenizer, arguments)
    if tokenizer.eos_token_id is None and model.config.eos_token_id != tokenizer.sep_token_id:
        if arguments.use_peft and not arguments.merge_adapter:
            raise ValueError(
                f"model_name_or_path={arguments.model_name_or_path!r} does not know the [CLS] and [SEP] of its "
                "tokenizer, and an adapter cannot tell it; accepted: merge_adapter=True as well, or use_peft=False"
            )
        _set_special_tokens(model, tokenizer)
    return model, tokenizer


def _source(arguments: ModelArguments) -> tuple[str, str, str]:
    """The argument that names the model or its tokenizer, the folder or Hub id in it, and the revision."""
    if arguments.model_name_or_path:
        return "model_name_or_path", arguments.model_name_or_path, arguments.model_revision
    if isinstance(arguments, Seq2SeqModelArguments):
        if arguments.encoder_model_name_or_path:
            return "encoder_model_name_or_path", arguments.encoder_model_name_or_path, "main"
        if not arguments.model_type:
            raise ValueError("no model is named; accepted: model_name_or_path, model_type, encoder_model_name_or_path")
    if arguments.model_type:
        if arguments.tokenizer_name is None:
            raise ValueError(f"model_type={arguments.model_type!r} has no tokenizer; accepted: with a tokenizer_name")
        return "tokenizer_name", arguments.tokenizer_name, "main"
    return "model_name_or_path", str(embedded_model_folder()), "main"


def _load(kind: Any, arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if arguments.model_type:
        return kind.from_config(new_config(arguments, tokenizer), dtype=getattr(torch, arguments.dtype))
    argument, name, revision = _source(arguments)
    settings: dict[str, Any] = {"revision": revision, "dtype": arguments.dtype}
    if arguments.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16 if arguments.dtype == "float16" else torch.bfloat16,
        )
        settings["device_map"] = {"": PartialState().local_process_index}
    model = _from_pretrained(kind, argument, name, **settings)
    if arguments.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if arguments.model_name_or_path is None:
        # what is saved says where the model is from, not where it lies on this machine
        model.name_or_path = model.config._name_or_path = EMBEDDED_MODEL
        warnings.filterwarnings("ignore", message="Could not find a config file in|Unable to fetch remote file")
    return model


def new_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of `model_type` with the vocabulary and special tokens of `tokenizer`, and the overrides.

    The decoder starts with the token of the role that starts it by default; where there is none, with padding, as T5.
    """
    kind = str(arguments.model_type)
    default = AutoConfig.for_model(kind)
    tokens = _special_tokens(tokenizer)
    roles = {getattr(default, name, None): token for name, token in tokens.items()}
    if getattr(default, "forced_eos_token_id", None) is not None:
        tokens["forced_eos_token_id"] = tokens["eos_token_id"]
    if default.is_encoder_decoder:
        start = getattr(default, "decoder_start_token_id", None)
        tokens["decoder_start_token_id"] = tokenizer.pad_token_id if start is None else roles.get(start)
    settings = {"vocab_size": len(tokenizer)} | tokens | arguments.config_values()
    return AutoConfig.for_model(kind, **settings)


def require_4bit(arguments: ModelArguments) -> None:
    """Check, where `load_in_4bit` is asked for, that bitsandbytes and a CUDA GPU are there."""
    if arguments.load_in_4bit and not is_bitsandbytes_available():
        raise ModuleNotFoundError("load_in_4bit=True needs the package bitsandbytes: pip install -U bitsandbytes")
    if arguments.load_in_4bit and not torch.cuda.is_available():
        raise ValueError("load_in_4bit=True needs a CUDA GPU, and torch finds none; accepted here: load_in_4bit=False")


def _load_pair(arguments: Seq2SeqModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An encoder–decoder of two models that share one vocabulary; only the attention between them is new."""
    encoder, decoder = arguments.encoder_model_name_or_path, str(arguments.decoder_model_name_or_path)
    named = ("decoder_model_name_or_path", decoder)
    if arguments.tokenizer_name is None and decoder != encoder:
        other = _from_pretrained(AutoTokenizer, *named, tokenizer_type=arguments.tokenizer_type)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"decoder_model_name_or_path={decoder!r} has another vocabulary than "
                f"encoder_model_name_or_path={encoder!r}; accepted: two models with one vocabulary"
            )
    config = _from_pretrained(AutoConfig, *named)
    config.is_decoder = config.add_cross_attention = True
    loaded, found = _from_pretrained(
        AutoModelForCausalLM, *named, config=config, dtype=arguments.dtype, output_loading_info=True
    )
    random = [key for key in found["missing_keys"] if not any(part in key for part in NEW_IN_A_DECODER)]
    if random and arguments.use_peft:
        raise ValueError(
            f"decoder_model_name_or_path={decoder!r} has no weights for {', '.join(sorted(random))}, which an adapter "
            "would leave random; accepted: use_peft=False, or a decoder with its LM head"
        )
    model: PreTrainedModel = EncoderDecoderModel.from_encoder_decoder_pretrained(
        encoder, decoder_model=loaded, encoder_dtype=arguments.dtype
    )
    _set_special_tokens(model, tokenizer)
    return model


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The tokens that start, end and pad a text; BERT's tokenizers call the first two [CLS] and [SEP]."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "bos_token_id": tokenizer.cls_token_id if start is None else start,
        "eos_token_id": tokenizer.sep_token_id if end is None else end,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation and the decoder's input start with [CLS] (or <s>) and end with [SEP] (or </s>)."""
    tokens = _special_tokens(tokenizer)
    tokens["decoder_start_token_id"] = tokens.pop("bos_token_id")
    for name, token in tokens.items():
        setattr(model.config, name, token)
        setattr(model.generation_config, name, token)


def _fit_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: ModelArguments) -> None:
    """Lengthen the embedding where the tokenizer has more tokens; rows to spare stay."""
    rows = model.config.get_text_config(decoder=True).vocab_size
    if len(tokenizer) <= rows:
        return
    # transformers would tie a head that is a matrix of its own to the longer embedding, as it does with every T5
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    own_head = model.config.get_text_config(decoder=True).tie_word_embeddings and not is_tied
    if arguments.use_peft or own_head or isinstance(model, EncoderDecoderModel):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens and the embedding "
            f"{rows} rows, which cannot be lengthened "
            f"{'under use_peft=True' if arguments.use_peft else 'in this model'}; accepted: the model's own tokenizer"
        )
    model.resize_token_embeddings(len(tokenizer))
    logger.warning(f"The embedding had {rows} rows and has {len(tokenizer)} now, as many as the tokenizer has tokens.")
