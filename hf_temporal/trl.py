"""TRL's `SFTTrainer` with position-weighted losses (`pip install 'hf-temporal[trl]'`)."""

from dataclasses import dataclass

from hf_temporal.installed import require

require("trl")

from trl import SFTConfig, SFTTrainer  # noqa: E402

from hf_temporal.trainer import TemporalWeightMixin  # noqa: E402
from hf_temporal.training_args import TemporalFields  # noqa: E402


@dataclass(repr=False)
class TemporalSFTConfig(TemporalFields, SFTConfig):
    """`SFTConfig`, with its defaults, plus the `temporal_*` fields, see `TemporalTrainingArguments`."""


class TemporalWeightSFTTrainer(TemporalWeightMixin, SFTTrainer):
    """`SFTTrainer` that weights each target token's loss by t^p, see `TemporalWeightMixin`.

    Its own logs stay (`entropy`, `mean_token_accuracy`, `num_tokens`, `aux_loss`), with the fused head as well.

    Raises:
        TypeError: `TemporalTrainingArguments` in place of `TemporalSFTConfig`.
        ValueError: with p ≠ 0, `loss_type="dft"`; `loss_weights` beside packing, padding-free batches or plain text.
    """
