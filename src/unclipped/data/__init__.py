"""Samples, readers, mixtures, labels and batches."""
