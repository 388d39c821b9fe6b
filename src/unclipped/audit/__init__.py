"""Probes of a frozen encoder: k-nearest neighbours, linear heads, segmentation, zero-shot, retrieval."""
