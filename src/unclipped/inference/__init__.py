"""Inference: one engine (batched greedy generation, streaming) used by chat, serving and evaluation."""
