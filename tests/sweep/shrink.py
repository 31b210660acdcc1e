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

MOST_PARAMETERS = 20_000_000
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
    (r".*vocab_size.*|.*n_tokens|num_embeddings", VOCABULARY),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|.*layerdrop|vocab_offset", 0),
    (r"first_k_dense_replace|moe_layer_start_index|n_shared_experts|num_shared_experts|n_group|n_groups", 1),
    (r"topk_group|mamba_n_groups|mamba_ngroups|num_codebooks|.*sparse_step|num_zero_experts|zero_expert_num", 1),
    (r"index_topk", 64),
    (r"mamba_d_ssm", lambda s: 2 * s.hidden),
    (r"qk_rope_head_dim", lambda s: s.rope_head_dim),
    (r"num_experts_per_tok.*|moe_topk|moe_k|.*top_?k(_experts)?|num_selected_experts", 2),
    (r"num_.*experts|n_routed_experts|num_local_experts|moe_num_experts|.*num_experts", 4),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", lambda s: 2 * s.hidden // 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r"linear_num_value_heads", 4),
    (r"linear_num_key_heads", 2),
    (r".*(key_value|kv)_heads|num_kv|.*n_kv_heads?|num_attention_groups|num_query_groups", lambda s: s.key_value_heads),
    (r".*(num|n|attention|self)_?.*heads?(_config)?|n_heads?|num_heads", lambda s: s.heads),
    (r"qk_head_dim", lambda s: 2 * s.head_dim),
    (r".*head_?dim|head_size|d_kv|kv_channels|qk_rope_head_dim|rotary_dim|attention_key_size", lambda s: s.head_dim),
    (r".*_rank|.*lora.*_dim|.*lora_r", 16),
    (r".*state_size|.*d_state|state_dim", 8),
    (r".*(intermediate|ffn|inner|ff|mlp|feed_?forward|ffw|shared_expert|expert).*(size|dim|hidden)s?", 64),
    (r"d_ff|n_inner|d_inner|.*ffn_hidden.*|.*mlp_hidden.*", 64),
    (r"(max|n|num)_.*positions?.*|n_ctx|max_seq_len|max_sequence_length|seq_length|max_.*length|context_length", 128),
    (r"(num|n|.*encoder|.*decoder)_?.*(layers?|blocks)|depth|n_layers?|num_hidden_layers", lambda s: s.layers),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|emb_dim|hidden_width|lru_width)", "hidden"),
    (r".*(hidden_size|hidden_dim|proj_dim|projection_dim|projector_dim|embedding_dim|embed_dim|output_dim).*", "hidden"),
    (r"dim|width|output_hidden_size|out_hidden_size|word_embed_proj_dim|embedding_size|d_embed", "hidden"),
)
UNSET = {"num_experts_per_tok": 2, "n_routed_experts": 4, "vocabulary_map": {"<image>": 85}}
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
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a configuration raises
            first = first or error if isinstance(error, Exception) else first
    if not made:
        said = first or RuntimeError("it has no sizes that fit")
        raise RuntimeError(f"{type(said).__name__}: {said}") from first


def _made(cls: Any, sizes: Sizes) -> Any:
    default = _default_config(cls)
    config = type(default).from_dict(shrunk(default.to_dict(), sizes))
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
    count = next((config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if _is_int(config.get(key))), 0)
    kept = _kept_layers(config, count, sizes)
    heads = next((config[key] for key in ("num_attention_heads", "n_head") if _is_int(config.get(key))), 0)
    result: dict[str, Any] = {}
    for index, (key, value) in enumerate(config.items()):
        if not isinstance(key, str) or key == "per_layer_config":
            continue
        if value is None and key in UNSET:
            result[key] = UNSET[key]
        elif key in SPECIAL or TOKEN.fullmatch(key):
            result[key] = _special(key, value, index)
        elif DROPOUT.fullmatch(key) and isinstance(value, float):
            result[key] = 0.0
        elif key in ("id2label", "label2id"):
            result[key] = value
        elif isinstance(value, dict):
            result[key] = _shrunk_rope(value, sizes) if key.startswith("rope_") else shrunk(value, sizes)
        elif isinstance(value, list) and count and len(value) == count:
            some = [value[layer] for layer in kept]
            result[key] = [_sized(key, each, sizes, heads) for each in some]
        elif isinstance(value, list) and key in ("embed_dim", "num_heads", "num_groups", "depths") and value:
            start = {"embed_dim": 16, "depths": 1}.get(key, 1)
            result[key] = [1 if key == "depths" else start * each // value[0] for each in value]
        elif key == "attention_types":
            result[key] = [[["global", "local"], 1]]
        elif key == "image_size" and _is_int(value):
            result[key] = 2 * config["patch_size"] if _is_int(config.get("patch_size")) else 32
        else:
            result[key] = _sized(key, value, sizes, heads)
    if "decoder_start_token_id" in config or config.get("is_encoder_decoder"):
        result["decoder_start_token_id"] = SPECIAL["decoder_start_token_id"]
    if "state_size" in config and "expand" in config and "num_heads" in config:  # Mamba 2
        result["num_heads"] = config["expand"] * sizes.hidden // sizes.head_dim
    if "use_cache" in config:
        result["use_cache"] = False
    return result


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
            small = sizes.hidden if size == "hidden" else size(sizes) if callable(size) else size
            if "key_value" in key and value == heads:
                small = sizes.heads
            return min(small, value) if small != 0 else 0
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
