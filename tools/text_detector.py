"""Train the text detector on generated scenes, whose text boxes are known, and on real images without text.

The weights that come with the package:

    python tools/text_detector.py --images $UNCLIPPED_DATA

Positive cells are those in text of generated scenes, some laid over photographs; negative ones are everything else: the
same scenes with their text taken out, shapes, patterns, photographs. Real images with text are never trained on: what
is measured on them says how it does on images of a kind it has not seen. The same command gives the same weights on the
same machine.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from unclipped.data.config import SourceConfig
from unclipped.data.generated.registry import open_generated
from unclipped.data.generated.scene import Scene
from unclipped.data.sample import ImagePart, Sample
from unclipped.data.sources import open_source
from unclipped.data.text_rich.detector import (
    CELL,
    FEWEST,
    WEIGHTS,
    TextDetector,
    TextRichScorer,
    evidence,
    load_scorer,
    normalised,
    surest,
)
from unclipped.images.config import ImageRule
from unclipped.images.prepare import decoded

SUMMARY = "Train the text detector of the filter text_rich, measure it and write its weights."
CROP = 128  # px a side of a training image
STEPS, BATCH, LEARNING_RATE = 1500, 32, 3e-3
IMAGE_WEIGHT = 0.3  # of the loss of whole images beside that of cells
SCENES, PHOTOGRAPHS = 3000, 2000  # scenes, and photographs of one set, kept in memory
CALIBRATION = 600  # whole images of each kind from which the score is fitted

FONTS = ["sans", "sans-bold", "sans-oblique", "mono", "mono-bold", "serif", "serif-bold", "serif-italic"]
_TEXT = {"fonts": FONTS, "word_length": [3, 8], "digits": [1, 5]}
GREY = ImageRule(channels=1)
KINDS: dict[str, dict[str, Any]] = {
    "characters": {**_TEXT, "size": [120, 160], "lines": [1, 4], "items": [1, 2], "font_size": [8, 30]},
    "receipts": {**_TEXT, "size": [160, 160], "words": "syllables", "digits": [1, 3], "font_size": [7, 14]},
    "tables": {**_TEXT, "size": [160, 288], "words": "syllables", "digits": [1, 4], "font_size": [7, 14]},
    "charts": {**_TEXT, "size": [144, 288], "words": "syllables", "word_length": [3, 5], "digits": [1, 2],
               "font_size": [7, 12]},
    "shapes": {"size": [128, 128], "count": [1, 9], "shape_size": [6, 40]},
}  # fmt: skip
WITHOUT_TEXT = {"clothing": "train", "bccd": "train", "nlvr": "train"}
"""Real sets that are trained on, with the split."""
MEASURED = (
    *(("clothing", "val", False), ("bccd", "val", False), ("nlvr", "val", False)),
    *(("sroie", "val_lines", True), ("sroie", "val_fields", True), ("tabmwp", "val", True), ("chartqa", "val", True)),
)
"""(real set, split, whether its images are full of text): where the scorer is measured."""

Labelled = tuple[np.ndarray, np.ndarray]
"""Grey uint8 (H, W), and float32 (H, W): 1 in boxes of text."""


def generated_scene(kind: str, split: str, index: int) -> Scene:
    """Scene `index` of a kind; its text is drawn from the words of the split."""
    return open_generated(kind, split, KINDS[kind], seed=17).scene(index)


def without_text(scene: Scene) -> Scene:
    """The scene with every string taken out."""
    return replace(scene, items=[item for item in scene.items if item.kind != "text"])


def text_map(scene: Scene) -> np.ndarray:
    """float32 (H, W): 1 in the boxes of strings."""
    found = np.zeros((scene.height, scene.width), dtype=np.float32)
    for item in scene.items:
        if item.kind == "text":
            x0, y0, x1, y1 = item.box
            found[y0:y1, x0:x1] = 1
    return found


def over_photograph(scene: Scene, photograph: np.ndarray, rng: np.random.Generator) -> Labelled:
    """The strings of a scene in one light or dark ink on a photograph stretched to its size."""
    image = Image.fromarray(photograph).resize((scene.width, scene.height), Image.Resampling.BILINEAR)
    shade = int(rng.choice([rng.integers(0, 40), rng.integers(215, 256)]))
    labels = np.zeros((scene.height, scene.width), dtype=np.float32)
    for item in scene.items:
        if item.kind != "text" or rng.random() < 0.3:
            continue
        x0, y0, x1, y1 = item.box
        labels[y0:y1, x0:x1] = 1
        for mask, x, y in item.stamps or ():
            image.paste(shade, (x0 + x, y0 + y), mask)
    return np.asarray(image), labels


def pools(images: Path | None) -> tuple[list[Labelled], list[np.ndarray]]:
    """(scenes with labels, half of those with text also without it; grey photographs without text).

    Without `images` the photographs are smooth noise, as a scene on them needs some ground.
    """
    scenes: list[Labelled] = []
    for index in range(SCENES):
        kind = list(KINDS)[index % len(KINDS)]
        scene = generated_scene(kind, "train", index)
        if kind != "shapes" and index % 2:
            scene = without_text(scene)
        scenes.append((np.asarray(scene.paint().convert("L")), text_map(scene)))
    if images is None:
        rng = np.random.default_rng(5)
        return scenes, [_smooth_noise(rng) for _ in range(PHOTOGRAPHS)]
    photographs: list[np.ndarray] = []
    for name, split in WITHOUT_TEXT.items():
        photographs += [np.asarray(_fitted(image)) for image in images_of(images / name, split, PHOTOGRAPHS)]
    return scenes, photographs


def _smooth_noise(rng: np.random.Generator) -> np.ndarray:
    side = int(rng.integers(3, 40))
    coarse = rng.integers(0, 256, (side, side), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((CROP, CROP), Image.Resampling.BICUBIC))


def _pattern(rng: np.random.Generator) -> np.ndarray:
    """Stripes, checks or dots, uint8 (128, 128): what cloth has in common with lines of text."""
    rows, columns = np.mgrid[0:CROP, 0:CROP].astype(np.float32)
    waves = []
    for _ in range(int(rng.integers(1, 3))):
        angle, length = rng.uniform(0, math.pi), np.exp(rng.uniform(math.log(3), math.log(24)))
        phase = 2 * math.pi * (rows * math.sin(angle) + columns * math.cos(angle)) / length
        waves.append(np.sin(phase + rng.uniform(0, 6)))
    is_product = len(waves) > 1 and rng.random() < 0.5
    values = waves[0] * waves[1] if is_product else np.sum(waves, axis=0)
    if rng.random() < 0.5:
        values = np.sign(values - rng.uniform(-0.6, 0.6))
    values = values + 0.5 * (_smooth_noise(rng).astype(np.float32) / 128 - 1)
    values = (values - values.min()) / max(float(np.ptp(values)), 1e-6)
    return (255 * values).astype(np.uint8)


def _fitted(image: Image.Image) -> Image.Image:
    grey = image.convert("L")
    grey.thumbnail((256, 256))
    return grey


def images_of(folder: Path, split: str, most: int) -> list[Image.Image]:
    """Different images of a split, up to `most`, evenly taken from its rows."""
    source = open_source(SourceConfig(source=str(folder / f"{split}.jsonl"), images=str(folder)))
    found: dict[str, Sample] = {}
    for index in range(source.length or 0):
        sample = source[index]
        found.setdefault(sample.images[0].label, sample)
    samples = list(found.values())
    chosen = [samples[place] for place in np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int)]
    return [decoded(sample.images[0]) for sample in chosen]


def training_image(
    index: int, scenes: Sequence[Labelled], photographs: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Image `index`: uint8 (128, 128), worn as scans and photographs are, and labels of its cells, float32 (32, 32)."""
    rng = np.random.default_rng([7, index])
    draw = rng.random()
    if draw < 0.08:
        pixels = _pattern(rng)
        labels = np.zeros(pixels.shape, dtype=np.float32)
    elif draw < 0.4:
        photograph = photographs[int(rng.integers(len(photographs)))]
        pixels, labels = photograph, np.zeros(photograph.shape, dtype=np.float32)
    elif draw < 0.55:
        kind = ("characters", "receipts", "tables")[int(rng.integers(3))]
        scene = generated_scene(kind, "train", 10**6 + index)
        pixels, labels = over_photograph(scene, photographs[int(rng.integers(len(photographs)))], rng)
    else:
        pixels, labels = scenes[int(rng.integers(len(scenes)))]
    pixels, labels = _rescaled_crop(pixels, labels, rng)
    cells = labels.reshape(CROP // CELL, CELL, CROP // CELL, CELL).mean(axis=(1, 3))
    return _worn(pixels, rng), (cells >= 0.5).astype(np.float32)


def _rescaled_crop(pixels: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Labelled:
    """Scaled by 0.6 to 1.8, then a random window; what lies outside takes the colour of the border."""
    scale = float(np.exp(rng.uniform(math.log(0.6), math.log(1.8))))
    size = (max(8, round(pixels.shape[1] * scale)), max(8, round(pixels.shape[0] * scale)))
    pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    gaps = [max(0, CROP - side) for side in pixels.shape]
    before = [int(rng.integers(gap + 1)) for gap in gaps]
    around = [(first, gap - first) for first, gap in zip(before, gaps, strict=True)]
    pixels, labels = np.pad(pixels, around, mode="edge"), np.pad(labels, around)
    top, left = (int(rng.integers(side - CROP + 1)) for side in pixels.shape)
    window = np.s_[top : top + CROP, left : left + CROP]
    return pixels[window], labels[window]


def _worn(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Less contrast, inverted, blurred, noisy, compressed: each with some probability."""
    image = Image.fromarray(pixels)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.2))))
    values = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.5:
        low = rng.uniform(0, 120)
        values = low + values * (rng.uniform(max(low + 60, 120), 255) - low) / 255
    if rng.random() < 0.25:
        values = 255 - values
    if rng.random() < 0.4:
        values = values + rng.normal(0, rng.uniform(1, 14), values.shape)
    image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(25, 90)))
        image = decoded(ImagePart(stream.getvalue()), GREY)
    return np.asarray(image)


def train_detector(scenes: Sequence[Labelled], photographs: Sequence[np.ndarray], steps: int = STEPS) -> TextDetector:
    """Train from fresh weights, with the cross-entropy of each cell."""
    torch.manual_seed(3)
    detector = TextDetector()
    optimiser = torch.optim.AdamW(detector.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    began = time.monotonic()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        drawn = [training_image(step * BATCH + i, scenes, photographs) for i in range(BATCH)]
        planes = torch.from_numpy(np.stack([normalised(pixels) for pixels, _ in drawn]))[:, None]  # (B, 1, H, W)
        cells = torch.from_numpy(np.stack([labels for _, labels in drawn]))  # (B, h, w)
        logits = detector(planes)
        loss = functional.binary_cross_entropy_with_logits(logits, cells)
        # The score looks at the surest cells, so these are held to what the whole image is, too.
        holds_text = (cells.flatten(1).sum(dim=1) >= FEWEST).float()
        loss = loss + IMAGE_WEIGHT * functional.binary_cross_entropy_with_logits(surest(logits), holds_text)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s", flush=True)
    return detector.eval()


def calibration_images(photographs: Sequence[np.ndarray]) -> list[tuple[Image.Image, bool]]:
    """Whole images, with and without text, none of which the detector has seen but the photographs."""
    rng = np.random.default_rng(9)
    found: list[tuple[Image.Image, bool]] = []
    for index in range(CALIBRATION):
        scene = generated_scene(list(KINDS)[index % len(KINDS)], "val", index)
        bare = without_text(scene)
        photograph = photographs[int(rng.integers(len(photographs)))]
        found += [(bare.paint(), False), (Image.fromarray(photograph), False)]
        if len(bare.items) < len(scene.items):
            written, labels = over_photograph(scene, photograph, rng)
            found.append((scene.paint(), True))
            if labels.any():
                found.append((Image.fromarray(written), True))
    return found


def calibrated(detector: TextDetector, images: Sequence[tuple[Image.Image, bool]]) -> TextRichScorer:
    """Fit the logistic function of `evidence`, which may fall with neither number.

    Both classes weigh the same; a small penalty keeps the fit finite.
    """
    inputs = torch.from_numpy(np.stack([evidence(detector, image) for image, _ in images]))  # (N, 2) float64
    wanted = torch.tensor([float(is_rich) for _, is_rich in images], dtype=torch.float64)
    share = wanted.mean()
    weight = torch.where(wanted > 0, 0.5 / share, 0.5 / (1 - share))
    raw = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # slopes before softplus
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([raw, offset], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        slope = functional.softplus(raw)
        value = functional.binary_cross_entropy_with_logits(inputs @ slope + offset, wanted, weight)
        value = value + 1e-3 * slope.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return TextRichScorer(detector, functional.softplus(raw).detach().numpy(), float(offset.detach()))


def measured(scorer: TextRichScorer, images: Path | None, most: int = 400) -> dict[str, dict[str, float]]:
    """Images and share told right at 0.5 of each measured set: generated test scenes, and those found in `images`."""
    sets: dict[str, tuple[list[Image.Image], bool]] = {}
    for kind in KINDS:
        scenes = [generated_scene(kind, "test", index) for index in range(100)]
        if kind != "shapes":
            sets[f"generated {kind}"] = ([scene.paint() for scene in scenes], True)
        sets[f"generated {kind}, no text"] = ([without_text(scene).paint() for scene in scenes], False)
    if images is not None:
        for name, split, is_rich in MEASURED:
            sets[f"{name} {split}"] = (images_of(images / name, split, most), is_rich)
    rows = {}
    for name, (pictures, is_rich) in sets.items():
        scores = np.array([scorer.score(picture) for picture in pictures])
        rows[name] = {
            "images": len(scores),
            "text_rich": float(is_rich),
            "accuracy": float(((scores >= 0.5) == is_rich).mean()),
            "median_score": float(np.median(scores)),
        }
    return rows


def main() -> None:
    """Train, write the weights, and measure what was written."""
    parser = argparse.ArgumentParser(prog="python tools/text_detector.py", description=SUMMARY)
    parser.add_argument("--images", type=Path, help="folder of the real sets; without it generated images only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / WEIGHTS, help="file of the weights")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the sums of one thread have one order
    scenes, photographs = pools(given.images)
    scorer = calibrated(train_detector(scenes, photographs, given.steps), calibration_images(photographs))
    told: dict[str, Any] = {
        "command": "python tools/text_detector.py"
        + ("" if given.images is None else " --images $UNCLIPPED_DATA")
        + ("" if given.steps == STEPS else f" --steps {given.steps}"),
        "trained_on": {
            "generated_scenes": len(scenes),
            "photographs": "smooth noise" if given.images is None else ", ".join(WITHOUT_TEXT),
            "steps": given.steps,
            "batch": BATCH,
            "torch": torch.__version__,
        },
    }
    scorer.save(given.output, told)
    measure(given.output, given.images)


def measure(path: Path, images: Path | None) -> None:
    """Measure the weights in a file, print the figures and write them into it."""
    scorer, told = load_scorer(path)  # what is measured is what was written, in half precision
    told["measured"] = measured(scorer, images)
    for name, row in told["measured"].items():
        print(
            f"{name:28} {row['images']:5.0f} images, {'text' if row['text_rich'] else 'no text'}: "
            f"{row['accuracy']:.3f} right, median score {row['median_score']:.3f}"
        )
    scorer.save(path, told)
    print(f"written: {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
