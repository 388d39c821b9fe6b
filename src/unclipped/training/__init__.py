"""Stages, the one trainer, optimisers and what a run measures."""
