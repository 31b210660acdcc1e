"""Pushes to the Hub: the model card, and what leaves this machine."""

from .push import HubMixin

__all__ = ["HubMixin"]
