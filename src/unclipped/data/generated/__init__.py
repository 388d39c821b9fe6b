"""Rendered images with exact answers: the data that needs no download."""
