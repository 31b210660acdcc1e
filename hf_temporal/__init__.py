"""Drop-in replacements for the Hugging Face `Trainer` that give each target token the weight t^p."""

from __future__ import annotations

__version__ = "0.1.0"

from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy

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
