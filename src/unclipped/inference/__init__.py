"""One engine for chat, serving and evaluation."""
