"""Vision encoders: self-supervised ViTs, language models turned into encoders, declared baselines."""
