"""Tar shards by member index, shuffled in a window, against `datasets` streaming of the same shards.

    python benchmarks/tar_shards.py [--repeats 7] [--shards 8] [--samples 250] [--window 1000] [--json FILE]

Both read the same generated shards (JPEG images of a photograph's size and a caption) whole, in one process on one
core, in turns: in every repeat each side reads every sample once, and the side that goes first changes. The files lie
in the page cache and the process's own CPU time is measured, so that neither the disk nor other programs count. Four
ways: ours in window order and in archive order, `datasets` streamed plain and shuffled with a buffer as long as our
window. Two amounts of work: the encoded bytes alone, and decoded to RGB. Reported are medians of samples per CPU
second, with the smallest and largest. The samples are compared first: captions and bytes must be equal. The scan that
makes the index is timed apart, since it is done once.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded

import argparse
import io
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL
from PIL import Image

from unclipped.core.files import write_json
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.mixture import Mixture
from unclipped.data.pairs import pair_of
from unclipped.data.sources import open_source

HEIGHT, WIDTH = 384, 512
Pairs = Iterator[tuple[bytes, str]]


def write_shards(folder: Path, shards: int, samples: int) -> int:
    """Shards of JPEG images with captions; returns their bytes."""
    generator = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:03}.tar", "w") as archive:
            for sample in range(samples):
                coarse = generator.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
                stream = io.BytesIO()
                Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(stream, "JPEG")
                number = shard * samples + sample
                for suffix, content in (("jpg", stream.getvalue()), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:07}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return sum(file.stat().st_size for file in folder.glob("*.tar"))


def ours(mixture: Mixture, shuffled: bool) -> Callable[[], Pairs]:
    source = mixture.units[0].source

    def pairs() -> Pairs:
        for index in range(mixture.length or 0):
            sample = mixture.sample(index) if shuffled else source[index]
            image, caption = pair_of(sample)
            yield image.source, caption

    return pairs


def theirs(folder: Path, window: int, shuffled: bool) -> Callable[[], Pairs]:
    stream = datasets.load_dataset(
        "webdataset", data_files=str(folder / "*.tar"), split="train", streaming=True
    ).cast_column("jpg", datasets.Image(decode=False))

    def pairs() -> Pairs:
        for row in stream.shuffle(seed=0, buffer_size=window) if shuffled else stream:
            yield row["jpg"]["bytes"], row["txt"]

    return pairs


def rate(pairs: Callable[[], Pairs], decode: bool) -> float:
    """Samples per CPU second of one pass, the making of the iterator included."""
    count = 0
    start = time.process_time()
    for content, _ in pairs():
        if decode:
            Image.open(io.BytesIO(content)).convert("RGB").load()
        count += 1
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats, at least 7")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--samples", type=int, default=250, help="samples a shard")
    parser.add_argument("--window", type=int, default=1000, help="samples shuffled together, by both")
    parser.add_argument("--json", metavar="FILE", help="write the figures and the settings here")
    arguments = parser.parse_args()
    if arguments.repeats < 7:
        parser.error("--repeats: at least 7, or the spread says nothing")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        size = write_shards(folder, arguments.shards, arguments.samples)
        config = SourceConfig(source=str(folder), options={"window": arguments.window})
        start = time.process_time()
        open_source(config)
        scan = time.process_time() - start
        mixture = Mixture(DataConfig(sources=(config,)))
        sides = {
            "ours, window order": ours(mixture, True),
            "ours, archive order": ours(mixture, False),
            "datasets, shuffle buffer": theirs(folder, arguments.window, True),
            "datasets, archive order": theirs(folder, arguments.window, False),
        }
        contents = [sorted(pairs()) for pairs in sides.values()]  # also the warm-up
        if any(content != contents[0] for content in contents):
            sys.exit("the two sides read different samples")
        total = arguments.shards * arguments.samples
        print(
            f"{total} samples of {WIDTH}x{HEIGHT} px in {arguments.shards} shards, {size / 2**20:.0f} MiB, window "
            f"{arguments.window}, 1 core, {arguments.repeats} repeats; index scan {scan / total * 1e6:.0f} us a sample"
        )
        rows = []
        for decode in (False, True):
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for repeat in range(arguments.repeats):
                turns = list(sides.items())
                for name, pairs in turns if repeat % 2 == 0 else reversed(turns):
                    rates[name].append(rate(pairs, decode))
            for name, values in rates.items():
                row = {"side": name, "decoded": decode, "median": statistics.median(values)}
                rows.append(row | {"low": min(values), "high": max(values)})
                print(
                    f"{'decoded' if decode else 'bytes':<9}{name:<26}{row['median']:>9.0f} samples/CPU s "
                    f"[{min(values):.0f}, {max(values):.0f}]",
                    flush=True,
                )
    if arguments.json:
        versions = {"python": platform.python_version(), "pillow": PIL.__version__, "datasets": datasets.__version__}
        write_json(
            arguments.json,
            {"versions": versions, "settings": vars(arguments), "scan_seconds": scan, "bytes": size, "rows": rows},
        )


if __name__ == "__main__":
    main()
