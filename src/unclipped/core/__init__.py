"""Small shared pieces: errors, configuration base, registry, files. Nothing here imports torch."""
