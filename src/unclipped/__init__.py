"""Unclipped: vision-language models without CLIP."""

__version__ = "0.1.0"
