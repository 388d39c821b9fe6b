"""Light connectors between encoder features and decoder embeddings."""
