"""Progress of an evaluation, shown as all long work is."""

from unclipped.core.progress import Counter, clock, counting

__all__ = ["Counter", "clock", "counting"]
