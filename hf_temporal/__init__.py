"""Drop-in replacements for the Hugging Face `Trainer` that give each target token the weight t^p."""

# ruff: noqa: F401
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation import load_profiles
    from .linear_cross_entropy import weighted_linear_cross_entropy
    from .losses import weighted_cross_entropy, weighted_regression_loss
    from .padding_free import use_padding_free
    from .positions import document_ids_of, target_positions
    from .schedules import power_at
    from .suggest import suggest_power
    from .trainer import TemporalWeightMixin, TemporalWeightSeq2SeqTrainer, TemporalWeightTrainer
    from .training_args import TemporalSeq2SeqTrainingArguments, TemporalTrainingArguments
    from .weighting import TemporalWeighting

__version__ = "0.1.0"

_NAMES = {
    "evaluation": ["load_profiles"],
    "linear_cross_entropy": ["weighted_linear_cross_entropy"],
    "losses": ["weighted_cross_entropy", "weighted_regression_loss"],
    "padding_free": ["use_padding_free"],
    "positions": ["document_ids_of", "target_positions"],
    "schedules": ["power_at"],
    "suggest": ["suggest_power"],
    "trainer": ["TemporalWeightMixin", "TemporalWeightSeq2SeqTrainer", "TemporalWeightTrainer"],
    "training_args": ["TemporalSeq2SeqTrainingArguments", "TemporalTrainingArguments"],
    "weighting": ["TemporalWeighting"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """A public name, or a module: what it needs of torch and transformers is loaded when it is asked for."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return [*globals(), *__all__]
