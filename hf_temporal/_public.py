"""The public names, loaded when the first of them is asked for: see `hf_temporal.__getattr__`."""

from __future__ import annotations

from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy

from . import __version__
from .evaluation import load_profiles
from .losses import weighted_cross_entropy, weighted_regression_loss
from .positions import document_ids_of, target_positions
from .schedules import power_at
from .suggest import suggest_power
from .trainer import TemporalWeightMixin, TemporalWeightSeq2SeqTrainer, TemporalWeightTrainer
from .training_args import TemporalSeq2SeqTrainingArguments, TemporalTrainingArguments
from .weighting import TemporalWeighting

__all__ = [
    "TemporalSeq2SeqTrainingArguments",
    "TemporalTrainingArguments",
    "TemporalWeightMixin",
    "TemporalWeightSeq2SeqTrainer",
    "TemporalWeightTrainer",
    "TemporalWeighting",
    "__version__",
    "document_ids_of",
    "load_profiles",
    "power_at",
    "suggest_power",
    "target_positions",
    "weighted_cross_entropy",
    "weighted_linear_cross_entropy",
    "weighted_regression_loss",
]
