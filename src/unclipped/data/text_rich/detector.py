"""A small convolutional network that says of each cell of an image whether it lies in a line of text, and the score.

The score of an image is a logistic function of two numbers: the share of its cells that surely hold text, and how sure
the surest ones are. It grows with both, so it ranks images by how much text they show. Weights come with the package;
`python tools/text_detector.py` makes them again and says how well they do.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from unclipped.core.errors import CheckpointError

LONGEST_SIDE = 768  # px: larger images are reduced to it, smaller ones are never enlarged
SHORTEST_SIDE = 32  # px: smaller images are padded with their border
CELL = 4  # px a side
SCALES = (1, 2)  # an image is also seen at half its size, for large letters
SUREST = 0.01  # share of the cells, and at least FEWEST of them, whose mean logit says how sure the surest are
FEWEST = 8  # cells: a short word
WEIGHTS = "text_rich.safetensors"
SURE = 2.0  # logit from which a cell surely holds text
_FLOOR = 1e-3


class TextDetector(nn.Module):
    """(B, 1, H, W) grey images, each of mean 0 -> logits (B, H / 4, W / 4): does the cell lie in a line of text?"""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(24, 24, 3, padding=2, dilation=2), nn.ReLU()),
            nn.Conv2d(24, 1, 3, padding=1),
        )

    def forward(self, planes: Tensor) -> Tensor:
        return self.layers(planes)[:, 0]


def normalised(pixels: np.ndarray) -> np.ndarray:
    """uint8 (…, H, W) grey -> float32 of mean 0 over the image, spread evened out for images of little contrast."""
    values = pixels.astype(np.float32) / 255
    mean = values.mean(axis=(-2, -1), keepdims=True)
    spread = values.std(axis=(-2, -1), keepdims=True)
    return (values - mean) / (spread + 0.1)


def grey_pyramid(image: Image.Image) -> list[np.ndarray]:
    """The image in grey at each scale, float32 (H, W) as `normalised`."""
    grey = image.convert("L")
    longest = max(grey.size)
    if longest > LONGEST_SIDE:
        ratio = LONGEST_SIDE / longest
        size = (max(1, round(grey.width * ratio)), max(1, round(grey.height * ratio)))
        grey = grey.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    levels = []
    for scale in SCALES:
        if scale > 1 and min(grey.size) < SHORTEST_SIDE:
            break  # letters that fill such an image are seen at its own size
        level = grey if scale == 1 else grey.reduce(scale)
        levels.append(normalised(_padded(np.asarray(level))))
    return levels


def _padded(pixels: np.ndarray) -> np.ndarray:
    """At least `SHORTEST_SIDE` px a side, the border repeated."""
    missing = [max(0, SHORTEST_SIDE - side) for side in pixels.shape]
    return np.pad(pixels, [(gap // 2, gap - gap // 2) for gap in missing], mode="edge")


def surest(logits: Tensor) -> Tensor:
    """(B, h, w) logits of cells -> (B,): the mean of the highest, a hundredth of them and at least eight."""
    flat = logits.flatten(1)
    count = min(max(FEWEST, round(SUREST * flat.shape[1])), flat.shape[1])
    return flat.topk(count, dim=1).values.mean(dim=1)


@torch.no_grad()
def evidence(detector: TextDetector, image: Image.Image) -> np.ndarray:
    """(2,): logarithm of the share of cells that surely hold text; mean logit of the surest; best of the scales."""
    found = []
    for level in grey_pyramid(image):
        logits = detector(torch.from_numpy(level)[None, None])  # (1, h, w)
        found.append([float((logits > SURE).float().mean()), float(surest(logits))])
    share, sure = np.max(found, axis=0)
    return np.array([np.log(share + _FLOOR), sure])


class TextRichScorer:
    """Scores images from 0 to 1: 0.5 and more is called text-rich. A function of the pixels alone."""

    def __init__(self, detector: TextDetector, slope: np.ndarray, offset: float) -> None:
        """slope: (2,), of the two numbers of `evidence`; offset: added to them."""
        self.detector, self.slope, self.offset = detector.eval(), slope, offset

    def score(self, image: Image.Image) -> float:
        """The score of an RGB or grey image."""
        return float(1 / (1 + np.exp(-(evidence(self.detector, image) @ self.slope + self.offset))))

    @property
    def digest(self) -> str:
        """Of everything a score depends on beside the pixels."""
        state = [tensor.numpy().tobytes() for tensor in self.detector.state_dict().values()]
        rule = repr((LONGEST_SIDE, SHORTEST_SIDE, SCALES, SUREST, FEWEST, SURE, self.slope.tolist(), self.offset))
        return hashlib.blake2b(b"".join([*state, rule.encode()]), digest_size=8).hexdigest()

    def save(self, path: Path, told: dict[str, Any]) -> None:
        """Write weights with `told`, what they were trained on and how well they do; whole or not at all."""
        from safetensors.torch import save

        tensors = {name: tensor.half().contiguous() for name, tensor in self.detector.state_dict().items()}
        tensors["slope"] = torch.from_numpy(self.slope).float()
        tensors["offset"] = torch.tensor([self.offset], dtype=torch.float32)
        temporary = path.with_name(f".{path.name}")
        temporary.write_bytes(save(tensors, metadata={"told": json.dumps(told)}))
        temporary.replace(path)


def load_scorer(path: Path) -> tuple[TextRichScorer, dict[str, Any]]:
    """Scorer and what is told of it. Raises CheckpointError when the file cannot be read or does not fit."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no mapping
            told = json.loads((file.metadata() or {}).get("told", "{}"))
        slope, offset = tensors.pop("slope").double().numpy(), float(tensors.pop("offset")[0])
        detector = TextDetector()
        detector.load_state_dict(tensors)
    except Exception as error:  # a damaged file raises of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: no weights of the text detector ({reason}); install the package again, or make them: "
            "python tools/text_detector.py"
        ) from None
    return TextRichScorer(detector, slope, offset), told


@lru_cache(maxsize=1)
def builtin_scorer() -> TextRichScorer:
    """The scorer that comes with the package."""
    with resources.as_file(resources.files("unclipped.data.text_rich") / WEIGHTS) as path:
        return load_scorer(path)[0]
