"""Any model class of transformers made tiny, by the names that stand in its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from tests.tiny_models import VOCABULARY, tiny_model

MOST_PARAMETERS = 40_000_000
DATA_BELOW = 80  # token ids from here on are special
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


@dataclass(frozen=True)
class Sizes:
    """The sizes that are tried; the first that fit are taken."""

    hidden: int = 32
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 8
    layers: int = 2
    rope_head_dim: int = 8
    keep: str = "$^"  # names that stay as they are


TRIED = (
    Sizes(),
    Sizes(key_value_heads=4),
    Sizes(layers=4),
    Sizes(layers=4, key_value_heads=4),
    Sizes(hidden=64, head_dim=16, key_value_heads=4),
    Sizes(hidden=64, head_dim=32, heads=2, key_value_heads=2),
    Sizes(head_dim=16, rope_head_dim=8, key_value_heads=4),
    Sizes(keep="head_dim|head_size|d_kv"),
    Sizes(hidden=128, heads=2, head_dim=64, key_value_heads=1),
    Sizes(hidden=256, heads=2, head_dim=128, key_value_heads=2),
    Sizes(hidden=64, heads=8, head_dim=8, key_value_heads=8, layers=6),
)

# name → size, the first that matches; a name is matched as a whole
RULES: tuple[tuple[str, Any], ...] = (
    (r"num_feat_extract_layers|num_adapter_layers", None),
    (r"attention_window", 8),
    (r"base_channels|latent_channels", 32),
    (r"attention_hidden_size", lambda s: 2 * s.hidden),
    (r"attention_head_dim", lambda s: 2 * s.head_dim),
    (r".*vocab_size.*|.*n_tokens|num_embeddings", VOCABULARY),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|.*layerdrop|vocab_offset", 0),
    (r"first_k_dense_replace|moe_layer_start_index|n_shared_experts|num_shared_experts|n_group|n_groups", 1),
    (
        r"num_group|topk_group|mamba_n_groups|mamba_ngroups|num_codebooks|.*sparse_step|num_zero_experts|zero_expert_num",
        1,
    ),
    (r"index_topk", 64),
    (r"mamba_d_ssm", lambda s: 2 * s.hidden),
    (r"qk_rope_head_dim", lambda s: s.rope_head_dim),
    (r"num_experts_per_tok.*|moe_topk|moe_k|.*top_?k(_experts)?|num_selected_experts", 2),
    (r"num_.*experts|n_routed_experts|num_local_experts|moe_num_experts|.*num_experts", 4),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", lambda s: 2 * s.hidden // 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r"linear_num_value_heads", 4),
    (r"linear_num_key_heads", 2),
    (
        r".*(key_value|kv)_heads|num_kv|.*n_kv_heads?|num_attention_groups|num_query_groups",
        lambda s: s.key_value_heads,
    ),
    (r".*(num|n|attention|self)_?.*heads?(_config)?|n_heads?|num_heads", lambda s: s.heads),
    (r"qk_head_dim", lambda s: 2 * s.head_dim),
    (r".*head_?dim|head_size|d_kv|kv_channels|qk_rope_head_dim|rotary_dim|attention_key_size", lambda s: s.head_dim),
    (r".*_rank|.*lora.*_dim|.*lora_r", 16),
    (r".*state_size|.*d_state|state_dim", 8),
    (r".*(intermediate|ffn|inner|ff|mlp|feed_?forward|ffw|shared_expert|expert).*(size|dim|hidden)s?", 64),
    (r"d_ff|n_inner|d_inner|.*ffn_hidden.*|.*mlp_hidden.*", 64),
    (r"(max|n|num)_.*positions?.*|n_ctx|max_seq_len|max_sequence_length|seq_length|max_.*length|context_length", 128),
    (r"(num|n|.*encoder|.*decoder)_?.*(layers?|blocks)|depth|n_layers?|num_hidden_layers", lambda s: s.layers),
    (
        r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|emb_dim|hidden_width|lru_width)",
        "hidden",
    ),
    (
        r".*(hidden_size|hidden_dim|proj_dim|projection_dim|projector_dim|embedding_dim|embed_dim|output_dim).*",
        "hidden",
    ),
    (
        r"dim|width|adapter_(in_dim|input_size)|output_hidden_size|out_hidden_size|word_embed_proj_dim|embedding_size|d_embed",
        "hidden",
    ),
)
UNSET = {  # where a configuration has None
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "n_shared_experts": 1,
    "sliding_window": 64,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "vocabulary_map": {"<image>": 85},
}
DROPOUT = re.compile(r".*(dropout|_pdrop|drop_?rate|layerdrop|drop_path|jitter|mask_time_prob|mask_feature_prob).*")
TOKEN = re.compile(r".*(token_id|token_index|token_ids?)")


def tiny(kind: str) -> Iterator[Any]:
    """Models of a class, one of each of the sizes that fit, made anew; float32, without dropout.

    Raises:
        RuntimeError: none fits, with what the first said.
    """
    if kind == "EncoderDecoderModel":
        yield tiny_model("encoder_decoder")
        return
    cls = getattr(transformers, kind)
    first: Exception | None = None
    made = False
    for sizes in TRIED:
        try:
            yield _made(cls, sizes)
            made = True
        except Exception as error:  # noqa: BLE001, PERF203  whatever a configuration raises
            first = first or error
    if not made:
        said = first or RuntimeError("it has no sizes that fit")
        raise RuntimeError(f"{type(said).__name__}: {said}") from first


def _made(cls: Any, sizes: Sizes) -> Any:
    default = _default_config(cls)
    config = type(default).from_dict(shrunk(default.to_dict(), sizes))
    if hasattr(config, "is_decoder") and cls.__name__.endswith(
        ("ForCausalLM", "LMHeadModel", "Decoder", "WithLMHead")
    ):
        config.is_decoder = True
    if "Thinker" in cls.__name__:
        config.vision_start_token_id = DATA_BELOW
    for each in _configs(config):
        for name in ("experts_implementation", "_experts_implementation"):
            if hasattr(each, name):
                setattr(each, name, "eager")
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in cls(config).parameters())
    except Exception:  # noqa: BLE001  a model that cannot be made there is made here
        count = 0
    if count > MOST_PARAMETERS:
        raise RuntimeError(f"its smallest is {count / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    model = cls(config).float()
    if hasattr(model, "set_default_language"):
        model.set_default_language(config.languages[0])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _default_config(cls: Any) -> Any:
    t = transformers
    if cls.__name__ == "VisionEncoderDecoderModel":
        return cls.config_class.from_encoder_decoder_configs(t.ViTConfig(), t.BertConfig())
    if cls.__name__ == "SpeechEncoderDecoderModel":
        return cls.config_class.from_encoder_decoder_configs(t.Wav2Vec2Config(), t.BertConfig())
    return cls.config_class()


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PretrainedConfig):
            yield from _configs(value)


def shrunk(config: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """A configuration, as a dictionary, with small sizes in place of its own."""
    count = _first_int(config, "num_hidden_layers", "n_layer", "num_layers")
    kept = _kept_layers(config, count, sizes)
    heads = _first_int(config, "num_attention_heads", "n_head")
    result: dict[str, Any] = {}
    for index, (key, value) in enumerate(config.items()):
        if not isinstance(key, str) or key == "per_layer_config":
            continue
        if key in SPECIAL or TOKEN.fullmatch(key):
            result[key] = _special(key, value, index)
        elif isinstance(value, dict):
            result[key] = _shrunk_dict(key, value, sizes)
        elif isinstance(value, list):
            some = [value[layer] for layer in kept] if count and len(value) == count else value
            result[key] = _shrunk_list(key, some, sizes, heads, by_layer=some is not value)
        elif key == "image_size" and _is_int(value):
            result[key] = 2 * config["patch_size"] if _is_int(config.get("patch_size")) else 32
        elif DROPOUT.fullmatch(key) and isinstance(value, float):
            result[key] = 0.0
        else:
            result[key] = _sized(key, UNSET.get(key) if value is None else value, sizes, heads)
    return result | _derived(config, result, sizes)


def _derived(config: dict[str, Any], result: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Entries that follow from others."""
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in config else {}
    if "decoder_start_token_id" in config or config.get("is_encoder_decoder"):
        more["decoder_start_token_id"] = SPECIAL["decoder_start_token_id"]
    if config.get("is_encoder_decoder"):
        more["pad_token_id"] = SPECIAL["pad_token_id"]
    if {"state_size", "expand", "num_heads"} <= config.keys():  # Mamba 2
        more["num_heads"] = config["expand"] * sizes.hidden // sizes.head_dim
    if str(config.get("model_type")).startswith("lfm2") and not result.get("layer_types", True):
        more["layer_types"] = ["conv", "full_attention"] * (sizes.layers // 2)
    if config.get("head_dim", 0) is None:
        more["head_dim"] = sizes.head_dim
    if config.get("mlp_layer_types", 0) is None:
        more["mlp_layer_types"] = ["dense", "sparse"] * (sizes.layers // 2)
    if config.get("num_key_value_heads", 0) is None:
        more["num_key_value_heads"] = sizes.heads
    return more


def _shrunk_dict(key: str, value: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    if any(not isinstance(each, str) for each in value) or key == "label2id":
        return value
    return _shrunk_rope(value, sizes) if key.startswith("rope_") else shrunk(value, sizes)


def _shrunk_list(key: str, value: list[Any], sizes: Sizes, heads: int, *, by_layer: bool) -> list[Any]:
    if key == "vision_feature_layer":
        return list(range(len(value)))
    if by_layer or key == "attention_window":
        return [_sized(key, each, sizes, heads) for each in value]
    if key in ("embed_dim", "num_heads", "num_groups", "depths") and value:  # by stage
        start = 16 if key == "embed_dim" else 1
        return [1 if key == "depths" else start * each // value[0] for each in value]
    return [[["global", "local"], 1]] if key == "attention_types" else value


def _first_int(config: dict[str, Any], *names: str) -> int:
    return next((config[name] for name in names if _is_int(config.get(name))), 0)


def _kept_layers(config: dict[str, Any], count: int, sizes: Sizes) -> list[int]:
    """Which layers stay: the first of each type."""
    for key in ("layer_types", "layers_block_type", "block_types"):
        types = config.get(key)
        if isinstance(types, list) and len(types) == count:
            first = sorted({types.index(each) for each in types})[: sizes.layers]
            first += [layer for layer in range(count) if layer not in first][: sizes.layers - len(first)]
            return sorted(first)
    return list(range(min(count, sizes.layers)))


def _special(key: str, value: Any, index: int) -> Any:
    if key in SPECIAL:
        return SPECIAL[key]
    if _is_int(value) and value >= DATA_BELOW:
        return DATA_BELOW + index % (VOCABULARY - DATA_BELOW)
    if isinstance(value, list):
        return [_special("", each, index + place) for place, each in enumerate(value)]
    return value


def _shrunk_rope(value: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    half = sizes.head_dim // 2
    result = dict(value)
    for key, entry in value.items():
        if isinstance(entry, dict):
            result[key] = _shrunk_rope(entry, sizes)
        elif key == "alpha" and entry is None:
            result[key] = 1.0
        elif key in ("mrope_section", "xdrope_section"):
            rest = half // len(entry)
            result[key] = [half - rest * (len(entry) - 1)] + [rest] * (len(entry) - 1)
        elif key in ("long_factor", "short_factor") and entry:
            result[key] = entry[:half]
    return result


def _sized(key: str, value: Any, sizes: Sizes, heads: int) -> Any:
    if not _is_int(value) or value <= 0 or re.fullmatch(sizes.keep, key):
        return value
    for pattern, size in RULES:
        if re.fullmatch(pattern, key):
            if size is None:
                return value
            small = sizes.hidden if size == "hidden" else size(sizes) if callable(size) else size
            if "key_value" in key and value == heads:
                small = sizes.heads
            return min(small, value) if small != 0 else 0
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
