"""Our image processor against the Pillow processors of transformers, rule for rule, on one core.

    python benchmarks/processor.py [--repeats 9] [--images 32] [--json FILE]

Both get the same decoded RGB images (decoding is not timed), in one process, one image a call, in turns: in every
repeat each set of images goes through both, and the side that goes first changes. Reported is the median over the
repeats of the ratio of times, with the smallest and the largest. The pixels are compared first: the largest difference
must be at most 1e-5.

Rules: Qwen2-VL (patch 14, merge 2, bicubic), as shipped, where transformers also writes every frame twice for its
temporal patch, and with a temporal patch of 1, so that both write equally much; SigLIP2 NaFlex (patch 16, bilinear,
256 patches), where transformers also pads to 256. They order patches or values differently: the comparison reorders.

Real images are used when UNCLIPPED_DATA (or ../shared/data beside the repository) names them, else generated ones.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are loaded

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from unclipped.core.files import write_json
from unclipped.images.decode import load_image
from unclipped.models.image_processing import UnclippedImageProcessor

TOLERANCE = 1e-5
GENERATED_SIZES = {"thumbnails": (96, 128), "tables": (190, 300), "charts": (557, 800), "photographs": (960, 1280)}


@dataclass(frozen=True)
class Comparison:
    """A pair of processors of one rule; `reordered` brings their output into our order."""

    name: str
    ours: UnclippedImageProcessor
    theirs: Callable[[Image.Image], Any]
    reordered: Callable[[Any], np.ndarray]


def qwen2_vl(temporal: int) -> Comparison:
    theirs = Qwen2VLImageProcessorPil(temporal_patch_size=temporal)
    patch, merge = theirs.patch_size, theirs.merge_size
    block_pixels = (patch * merge) ** 2
    ours = UnclippedImageProcessor(
        native_variant="qwen2_vl",
        patch_size=patch,
        merge=merge,
        min_tokens=theirs.size["shortest_edge"] // block_pixels,
        max_tokens=theirs.size["longest_edge"] // block_pixels,
        mean=theirs.image_mean,
        std=theirs.image_std,
    )

    def reordered(output: Any) -> np.ndarray:
        _, h, w = output["image_grid_thw"][0].tolist()
        patches = output["pixel_values"].numpy().reshape(h // merge, w // merge, merge, merge, 3, temporal, -1)
        assert (patches[..., :1, :] == patches).all(), "frames differ"
        return patches[..., 0, :].transpose(0, 2, 1, 3, 4, 5).reshape(h * w, -1)  # row-major, (C, ph, pw)

    name = "Qwen2-VL" if temporal == 2 else "Qwen2-VL, temporal patch 1"
    return Comparison(name, ours, lambda image: theirs(image, return_tensors="pt"), reordered)


def siglip2() -> Comparison:
    theirs = Siglip2ImageProcessorPil()
    patch = theirs.patch_size
    ours = UnclippedImageProcessor(
        native_variant="siglip2", patch_size=patch, max_tokens=theirs.max_num_patches, resample="bilinear"
    )

    def reordered(output: Any) -> np.ndarray:
        count = int(output["pixel_attention_mask"].sum())
        patches = output["pixel_values"][0, :count].numpy().reshape(count, patch, patch, 3)
        return patches.transpose(0, 3, 1, 2).reshape(count, -1)  # (C, ph, pw)

    return Comparison("SigLIP2 NaFlex", ours, lambda image: theirs(image, return_tensors="pt"), reordered)


def image_sets(count: int) -> tuple[dict[str, list[Image.Image]], str]:
    """Up to `count` RGB images a set, and where they come from."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("UNCLIPPED_DATA", default))
    sets = {}
    for name in ("clothing", "tabmwp", "chartqa"):
        paths = sorted((folder / name / "images").rglob("*.*"))
        paths = paths[:: max(1, len(paths) // count)][:count]
        if paths:
            sets[name] = [load_image(path) for path in paths]
    if sets:
        return sets, "real images"
    generator = np.random.default_rng(0)
    for name, (height, width) in GENERATED_SIZES.items():
        coarse = generator.integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
        sets[name] = [Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC) for array in coarse]
    return sets, "generated images"


def largest_difference(comparison: Comparison, images: list[Image.Image]) -> float:
    """Largest absolute difference of pixel values over the images. Exits when a grid or a pixel differs."""
    largest = 0.0
    for image in images:
        ours = comparison.ours(image)["pixel_values"].numpy()
        theirs = comparison.reordered(comparison.theirs(image))
        if ours.shape != theirs.shape:
            sys.exit(f"{comparison.name}, {image.size}: {ours.shape} patches against {theirs.shape}")
        largest = max(largest, float(np.abs(ours - theirs).max()))
    if largest > TOLERANCE:
        sys.exit(f"{comparison.name}: pixels differ by {largest}")
    return largest


def seconds(process: Callable[[Image.Image], Any], images: list[Image.Image]) -> float:
    start = time.perf_counter()
    for image in images:
        process(image)
    return time.perf_counter() - start


def measure(comparison: Comparison, images: list[Image.Image], repeats: int) -> dict[str, Any]:
    """Images/s of both sides and the ratio of times, over interleaved repeats."""
    difference = largest_difference(comparison, images)  # also the warm-up
    ours: list[float] = []
    theirs: list[float] = []
    for repeat in range(repeats):
        turns = [(comparison.ours, ours), (comparison.theirs, theirs)]
        for process, times in turns if repeat % 2 == 0 else reversed(turns):
            times.append(seconds(process, images))
    ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
    return {
        "rule": comparison.name,
        "images": len(images),
        "median_height": statistics.median(image.height for image in images),
        "median_width": statistics.median(image.width for image in images),
        "ours_images_per_second": len(images) / statistics.median(ours),
        "theirs_images_per_second": len(images) / statistics.median(theirs),
        "ratio_median": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "largest_difference": difference,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats, at least 7")
    parser.add_argument("--images", type=int, default=32, help="images a set")
    parser.add_argument("--json", metavar="FILE", help="write the figures and the settings here")
    arguments = parser.parse_args()
    if arguments.repeats < 7:
        parser.error("--repeats: at least 7, or the spread says nothing")
    torch.set_num_threads(1)
    sets, origin = image_sets(arguments.images)
    rows = []
    print(f"{cpu_name()}, 1 thread, {origin}, {arguments.repeats} repeats; images/s, ratio median [low, high]")
    print(f"{'rule':<28}{'set':<14}{'size':>10}{'ours':>10}{'theirs':>10}   ratio               difference")
    for comparison in (qwen2_vl(2), qwen2_vl(1), siglip2()):
        for name, images in sets.items():
            row = {"set": name, **measure(comparison, images, arguments.repeats)}
            rows.append(row)
            size = f"{row['median_height']:.0f}x{row['median_width']:.0f}"
            print(
                f"{row['rule']:<28}{name:<14}{size:>10}{row['ours_images_per_second']:>10.1f}"
                f"{row['theirs_images_per_second']:>10.1f}   {row['ratio_median']:.2f} [{row['ratio_low']:.2f}, "
                f"{row['ratio_high']:.2f}]   {row['largest_difference']:.1e}",
                flush=True,
            )
    if arguments.json:
        versions = {"python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__}
        versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
        command = f"python benchmarks/processor.py --repeats {arguments.repeats} --images {arguments.images}"
        settings = {"threads": 1, "repeats": arguments.repeats, "source": origin, "tolerance": TOLERANCE}
        write_json(
            arguments.json,
            {"hardware": cpu_name(), "versions": versions, "settings": settings, "command": command, "rows": rows},
        )


if __name__ == "__main__":
    main()
