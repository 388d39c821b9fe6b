"""Image-text pairs for tests of pretraining: plain images and their colours as captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VIT = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def write_pairs(folder: Path, rows: int = 12, **changed: Any) -> Path:
    """Plain images and their colours as captions; `changed` replaces fields of row 2."""
    folder.mkdir(parents=True, exist_ok=True)
    random, lines = np.random.default_rng(0), []
    for number in range(rows):
        colour = list(COLOURS)[number % len(COLOURS)]
        noise = random.integers(-20, 20, (24, 20, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        row = {"id": f"pair-{number}", "image": f"{number}.png", "question": "", "answer": f"a {colour} thing"}
        lines.append(json.dumps({k: v for k, v in (row | (changed if number == 2 else {})).items() if v is not None}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder
