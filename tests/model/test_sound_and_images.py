"""Encoder–decoders that read sound or images, which cannot be tried out on tokens: their first batch is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from packaging.version import Version
from torch import Tensor

from hf_temporal import TemporalSeq2SeqTrainingArguments, TemporalWeightSeq2SeqTrainer

_SPEECH: dict[str, Any] = {
    "vocab_size": 97, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "max_target_positions": 32,
}  # fmt: skip
_PATCHES = torch.tensor([[row // 4 + 1.0, row % 4 + 1.0] for row in range(8)])
MODELS: dict[str, tuple[Callable[[], Any], str, Callable[[], Tensor]]] = {
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                **_SPEECH, num_mel_bins=8, max_source_positions=16, suppress_tokens=None, begin_suppress_tokens=None
            )
        ),
        "input_features",
        lambda: torch.randn(8, 32),
    ),
    "speech2text": (
        lambda: hf.Speech2TextForConditionalGeneration(
            hf.Speech2TextConfig(
                **_SPEECH, input_feat_per_channel=8, input_channels=1, conv_channels=16, max_source_positions=64,
                num_conv_layers=1, conv_kernel_sizes=[3],
            )
        ),
        "input_features",
        lambda: torch.randn(32, 8),
    ),
    "moonshine": (
        lambda: hf.MoonshineForConditionalGeneration(
            hf.MoonshineConfig(
                vocab_size=97, hidden_size=32, intermediate_size=24, encoder_num_hidden_layers=1,
                decoder_num_hidden_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )
        ),
        "input_values",
        lambda: torch.randn(3000),
    ),
    "pix2struct": (
        lambda: hf.Pix2StructForConditionalGeneration(
            hf.Pix2StructConfig(
                text_config={
                    "vocab_size": 97, "hidden_size": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
                    "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
                },
                vision_config={
                    "hidden_size": 16, "patch_embed_hidden_size": 12, "d_ff": 24, "d_kv": 8, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "seq_len": 8, "patch_size": 2, "dropout_rate": 0.0,
                    "attention_dropout": 0.0,
                },
            )
        ),
        "flattened_patches",
        lambda: torch.cat([_PATCHES, torch.randn(8, 12)], dim=1),
    ),
}  # fmt: skip


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["labels"]) for row in rows)
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
    return {
        key: torch.tensor(labels) if key == "labels" else torch.stack([row[key] for row in rows]) for key in rows[0]
    }


@pytest.mark.parametrize("name", MODELS)
def test_loss_gradient_and_evaluation(name: str, tmp_path: Path) -> None:
    make, key, draw = MODELS[name]
    torch.manual_seed(0)
    state = make().state_dict()
    state = {name: torch.randn_like(value) * 0.3 if value.dim() > 1 else value for name, value in state.items()}
    rows = [{key: draw(), "labels": [5 + i, 9, 11 + i, 2][: 3 + i % 2]} for i in range(4)]

    def model() -> Any:
        made = make()
        made.load_state_dict(state)
        return made

    def logged(kind: Any, arguments: Any, **own: Any) -> tuple[float, float, float]:
        args = arguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_steps=1, remove_unused_columns=False, **own,
        )  # fmt: skip
        trainer = kind(model=model(), args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
        trainer.train()
        entry = trainer.state.log_history[0]
        return entry["loss"], entry["grad_norm"], trainer.evaluate()["eval_loss"]

    def weighted(power: float) -> tuple[float, float, float]:
        return logged(TemporalWeightSeq2SeqTrainer, TemporalSeq2SeqTrainingArguments, temporal_power=power)

    assert weighted(0.0) == pytest.approx(logged(hf.Seq2SeqTrainer, hf.Seq2SeqTrainingArguments), rel=1e-5)
    if name == "moonshine" and Version(hf.__version__) < Version("5.15"):  # which shifts its labels a second time
        with pytest.raises(ValueError, match="a shift of the labels that its class does not tell"):
            weighted(2.0)
        return
    reference, total, count = model().eval(), 0.0, 0
    for row in rows:
        batch = collate([row])
        with torch.no_grad():
            losses = F.cross_entropy(reference(**batch).logits[0].double(), batch["labels"][0], reduction="none")
        weights = torch.arange(1, len(losses) + 1).double() ** 2
        total += float((weights * losses).sum() * len(losses) / weights.sum())
        count += len(losses)
    assert weighted(2.0)[0] == pytest.approx(total / count, rel=1e-5)
