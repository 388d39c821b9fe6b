"""Multi-crop views a second on one core: our random views against lightly's on Pillow and torchvision.

Both make of each image two global views and local ones with the same sizes, shares of area, jitter, grey, blur and
solarisation (DINOv2's), normalised float32 planes at the end. First from images that are decoded already, then from
encoded bytes. Images are generated JPEGs of a photograph's size, or the files of a folder. Both sides run in one
process on one core, in turns over all images, the first one changing. Reported are views per second of CPU time,
medians over rounds, and the ratio of ours to lightly's with the smallest and the largest round.

Lightly is for this comparison only: install it and torchvision in an environment of their own (`pip install lightly`);
without them its side is left out, which is said.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are loaded

import argparse
import importlib.util
import io
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

# torchvision, which lightly imports, does not load its native library beside a torch of another build. Its import then
# asks for two operators that nothing here calls, so they are declared before anything imports it.
HAS_LIGHTLY = all(importlib.util.find_spec(name) is not None for name in ("lightly", "torchvision"))
if HAS_LIGHTLY:
    TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from unclipped.core.files import write_json  # noqa: E402
from unclipped.data.views import MultiCrop  # noqa: E402
from unclipped.data.views_config import PUBLISHED_SIDE  # noqa: E402
from unclipped.images.config import ImageRule  # noqa: E402
from unclipped.images.decode import load_image  # noqa: E402
from unclipped.images.prepare import normalised  # noqa: E402

EXAMPLES = """examples:
  python benchmarks/views.py
  python benchmarks/views.py --global-size 96 --local-size 48 --local-crops 4 --images ~/photographs
"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GLOBAL_SCALE, LOCAL_SCALE = (0.32, 1.0), (0.05, 0.32)
Side = Callable[[bytes | Image.Image], list[Tensor]]


def generated(count: int, width: int, height: int) -> list[bytes]:
    """JPEGs with shapes of a photograph's coarseness."""
    generator, encoded = np.random.default_rng(0), []
    for _ in range(count):
        coarse = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        encoded.append(stream.getvalue())
    return encoded


def ours(global_size: int, local_size: int, local_crops: int) -> Side:
    crop = MultiCrop(global_size, local_size, local_crops, GLOBAL_SCALE, LOCAL_SCALE)
    rule = ImageRule(rule="squash", size=(global_size, global_size), mean=MEAN, std=STD)
    generator = np.random.default_rng(0)

    def views(source: bytes | Image.Image) -> list[Tensor]:
        image = load_image(source) if isinstance(source, bytes) else source
        made = crop(image, generator)
        return [
            normalised(torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2), rule)
            for some in (made[:2], made[2:])
            if some
        ]

    return views


def lightly(global_size: int, local_size: int, local_crops: int) -> Side:
    from lightly.transforms import DINOTransform

    transform = DINOTransform(
        global_crop_size=global_size,
        global_crop_scale=GLOBAL_SCALE,
        local_crop_size=local_size,
        local_crop_scale=LOCAL_SCALE,
        n_local_views=local_crops,
        sigmas=(0.1 * global_size / PUBLISHED_SIDE, 2.0 * global_size / PUBLISHED_SIDE),
        normalize={"mean": list(MEAN), "std": list(STD)},
    )

    def views(source: bytes | Image.Image) -> list[Tensor]:
        image = Image.open(io.BytesIO(source)).convert("RGB") if isinstance(source, bytes) else source
        return transform(image)

    return views


def compare(sides: dict[str, Side], sources: list[bytes] | list[Image.Image], views: int, repeats: int) -> list[dict]:
    """Views a second of each side, in turns, printed and returned; then the ratios of the first side to the others."""
    for side in sides.values():
        made = side(sources[0])
        assert sum(1 if planes.ndim == 3 else len(planes) for planes in made) == views
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        turns = list(sides.items())
        for name, side in turns if repeat % 2 == 0 else reversed(turns):
            start = time.process_time()
            for source in sources:
                side(source)
            rates[name].append(views * len(sources) / (time.process_time() - start))
    first, *others = sides
    rows = []
    for name, values in rates.items():
        row = {"side": name, "median": statistics.median(values), "low": min(values), "high": max(values)}
        if name in others:
            ratios = [own / theirs for own, theirs in zip(rates[first], values, strict=True)]
            row |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        rows.append(row)
        print(f"  {name:<8} {row['median']:8.1f} views/CPU s [{row['low']:.1f}, {row['high']:.1f}]", flush=True)
        if name in others:
            print(f"  {first} / {name}: {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="JPEGs to read instead of generated ones")
    parser.add_argument("--count", type=int, default=24, help="images in a round (default 24)")
    parser.add_argument("--width", type=int, default=512, help="of generated images in pixels (default 512)")
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--global-size", type=int, default=224, help="side of global views in pixels (default 224)")
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--local-crops", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--json", metavar="FILE", help="write the figures and the settings here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    if given.images is None:
        encoded = generated(given.count, given.width, given.height)
    else:
        files = sorted(path for path in given.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if not files:
            parser.error(f"--images: no JPEG in {given.images}")
        encoded = [path.read_bytes() for path in files[: given.count]]
    decoded = [load_image(content) for content in encoded]
    sizes = given.global_size, given.local_size, given.local_crops
    sides = {"ours": ours(*sizes)}
    if HAS_LIGHTLY:
        sides["lightly"] = lightly(*sizes)
    else:
        print("lightly and torchvision are not installed: their side is left out")
    print(
        f"{len(encoded)} JPEGs, the first of {decoded[0].width}x{decoded[0].height} px, 2x{given.global_size} and "
        f"{given.local_crops}x{given.local_size} px, Pillow {PIL.__version__}, torch {torch.__version__}, "
        f"{given.repeats} rounds"
    )
    rows: list[dict] = []
    for name, sources in (("views", decoded), ("decoded", encoded)):
        print("views of decoded images" if name == "views" else "decoding and views")
        rows += [row | {"work": name} for row in compare(sides, sources, 2 + given.local_crops, given.repeats)]
    if given.json:
        settings = {name: str(value) for name, value in vars(given).items() if name != "json"}
        versions = {"python": platform.python_version(), "pillow": PIL.__version__, "torch": torch.__version__}
        write_json(given.json, {"versions": versions, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
