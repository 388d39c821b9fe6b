"""Sparse prefill measured: what a pattern keeps, what it changes, what it costs, and which one to take."""
