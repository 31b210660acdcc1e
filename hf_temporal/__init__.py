"""Drop-in replacements for the Hugging Face `Trainer` that give each target token the weight t^p."""

from __future__ import annotations

__version__ = "0.1.0"
