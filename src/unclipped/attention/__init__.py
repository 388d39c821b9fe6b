"""Sparse prefill: visual layouts, patterns, block plans, backends and the entry into transformers."""
