"""Samples as tensors: chat templates rendered, tokens and labels, images in patches, batches padded."""
