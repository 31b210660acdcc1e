"""New models of two layers and width 64, ready for the copying task: seconds to minutes a run on a CPU."""

from typing import Any

_WIDTH: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2}
_FEED_FORWARD: dict[str, Any] = {**_WIDTH, "intermediate_size": 128}
_ATTENTION: dict[str, Any] = {
    **_FEED_FORWARD,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.125,  # 1/√width; from 0.02 on the tasks are learned late, or not at all
}
_DELTA: dict[str, Any] = {
    **_ATTENTION,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

SMALL: dict[str, dict[str, Any]] = {
    "llama": _ATTENTION,
    "mamba2": {**_WIDTH, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 32},
    # Griffin's layers: a gated linear recurrence, and attention to the last 16 tokens
    "recurrent_gemma": {
        **_WIDTH,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "lru_width": 64,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    # gated delta rule alone, without experts; transformers' cache asks an attention layer for the length
    "qwen3_next": {
        **_DELTA,
        "head_dim": 16,
        "layer_types": ["linear_attention", "linear_attention"],
        "mlp_only_layers": [0, 1],
        "num_experts": 0,
        "use_cache": False,
    },
    # hybrids: a layer with a state, and one of attention
    "olmo_hybrid": {**_DELTA, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {
        **_ATTENTION,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 32,
        "attn_layer_indices": [1],
    },
    # its cache rounds the width of queries up to 64, its layers do not
    "xlstm": {**_WIDTH, "num_heads": 4, "qk_dim_factor": 1.0, "chunk_size": 16},
    "rwkv": {**_FEED_FORWARD, "attention_hidden_size": 64},
    "memory_linear_rnn": {"hidden_size": 64},
    "memory_tanh_rnn": {"hidden_size": 64},
    "memory_tcn": {"hidden_size": 64},
    "memory_state_space": {"hidden_size": 64},
    "memory_attention": {"hidden_size": 64},
    "t5": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    },
}


def small_settings(model_type: str) -> dict[str, Any]:
    """The settings of the small model of a kind, or a `ValueError` with the kinds that there are."""
    if model_type not in SMALL:
        raise ValueError(
            f"config_overrides='small' for model_type={model_type!r}; accepted: name=value,..., or small for one of "
            f"{', '.join(SMALL)}"
        )
    return dict(SMALL[model_type])
