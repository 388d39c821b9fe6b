"""Reading a number on a page of 4,096 visual tokens: the three studies of sparse prefill on trained models.

twins     the same model lengthened to whole pages under a sparse plan and densely, and blind; 2,000 pages
frontier  patterns at about equal density on the dense twin, none of them trained for, with one that is searched
merged    all tokens with sparse prefill against 2x2- and 4x4-merged tokens with dense prefill, which see the same pages
          at 1.375 and 1.625 times the size: meant for equal time to first token by an estimate, to be checked with
          `unclipped prefill bench` before the figures are read so
frozen    the same reading by a linear connector between frozen parts

Every step is one command of `unclipped`; finished ones are kept, interrupted ones go on when the line is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python benchmarks/pages.py --runs runs
  python benchmarks/pages.py --runs runs --only frontier --pages 400
"""
STUDIES = ("twins", "frontier", "merged", "frozen")
BLOCKS = ["sparse.key_block=64", "sparse.query_block=128"]
FRONTIER = {
    "window": "global_text + sink(64) + window(192)",
    "window-2d": "global_text + sink(64) + window2d(2, 2)",
    "grid": "global_text + sink(64) + grid(32, axis=row)",
    "top-k-and-text": "global_text + topk(3)",
    "random-and-text": "global_text + random(3)",
    "vertical-slash": "vertical_slash(2, 2)",
    "top-k": "topk(4)",
    "random": "random(4)",
}
"""Density 0.14 to 0.17 each, with blocks of 64 keys and 128 queries on such a page."""
CANDIDATES = (
    "topk(1)",
    "topk(4)",
    "global_text + topk(1)",
    "global_text + topk(4)",
    "global_text + sink(64)",
    "global_text + sink(64) + window(192)",
    "global_text + sink(64) + window2d(2, 2)",
    "full",
)
TILE = 64  # px of the encoder's tile
SCALES = {2: (704, (18, 25), (16, 22)), 4: (832, (21, 29), (21, 29))}
"""Merging → side of the page in px, font sizes on it, and on the crops before."""


class Steps:
    """Runs commands one after another, one thread each."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def at(self, name: str) -> str:
        return str(self.runs / name)

    def model(self, name: str) -> str:
        return str(self.runs / name / "model")

    def run(self, command: str, *arguments: str, output: str, done: str) -> None:
        """One command, unless the file `done` in its folder shows that it has ended."""
        folder = self.runs / output
        if (folder / done).exists():
            print(f"-- {output}: kept", flush=True)
            return
        resume = ["--resume"] if folder.exists() and command != "compare" else []
        line = [sys.executable, "-m", "unclipped", *command.split(), *arguments, "--output", str(folder), *resume]
        print("--", *line[1:], flush=True)
        subprocess.run(line, check=True, env=self.environment)

    def pretrain(self, recipe: str) -> None:
        self.run("pretrain", recipe, "training.threads=1", output=recipe, done="report.html")

    def train(self, recipe: str, *overrides: str, output: str | None = None) -> None:
        self.run("train", recipe, *overrides, "training.threads=1", output=output or recipe, done="report.html")


def needle(
    side: tuple[int, int], cells: tuple[int, int], font: tuple[int, int], weight: float = 1.0, **more: Any
) -> Any:
    options = {"size": list(side), "cells": list(cells), "font_size": list(font), **more}
    return {"source": "generated:needle", "weight": weight, "options": options}


def override(path: str, value: Any) -> str:
    return f"{path}={json.dumps(value)}"


def prepare(steps: Steps) -> None:
    steps.pretrain("pages-lm")
    steps.pretrain("pages-mae")
    parts = [f"model.vision={steps.model('pages-mae')}", f"model.text={steps.model('pages-lm')}"]
    steps.train("pages-crops", *parts)
    steps.train("pages-quarters", f"model.checkpoint={steps.model('pages-crops')}")
    steps.train("pages-dense", f"model.checkpoint={steps.model('pages-quarters')}")


def twins(steps: Steps) -> None:
    prepare(steps)
    steps.train("pages-sparse", f"model.checkpoint={steps.model('pages-quarters')}")
    named = [f"dense={steps.at('pages-dense')}", f"sparse={steps.at('pages-sparse')}"]
    named.append(f"blind={steps.at('pages-dense')}/baselines/blind")
    steps.run("compare", *named, output="pages-twins", done="report.html")


def frontier(steps: Steps, pages: int) -> None:
    prepare(steps)
    dense = steps.model("pages-dense")
    size = "task.source.options={size: [512, 512], cells: [16, 8]}"
    candidates = [word for text in CANDIDATES for word in ("--candidate", text)]
    blocks = ["--key-block", "64", "--query-block", "128", "--threads", "1"]
    bounds = ["--bound", "kl=0.1", "--density", "0.25", "--limit", "24", "--no-rulers"]
    data = ["--data", "generated:needle", "--split", "val"]
    searched = "pages-searched"
    steps.run("prefill search", dense, *data, size, *bounds, *candidates, *blocks, output=searched, done="report.html")
    patterns = {**FRONTIER, "searched": str(steps.runs / searched / "pattern.yaml")}
    short = [f"tasks.needle.limit={pages}"]
    names = []
    for name, pattern in {"dense": None, **patterns}.items():
        under = [] if pattern is None else ["--sparse", pattern, "--sparse-fallback", "never"]
        under += BLOCKS if name in FRONTIER else []
        output = f"pages-frontier/{name}"
        steps.run("eval", dense, "--recipe", "pages-dense", *under, *short, output=output, done="results.json")
        names.append(f"{name}={steps.at(output)}")
    steps.run("compare", *names, output="pages-frontier/compared", done="report.html")


def merged(steps: Steps, merges: Iterable[int]) -> None:
    twins(steps)
    names = [f"all={steps.at('pages-sparse')}"]
    for merge in merges:
        side, page_font, font = SCALES[merge]
        near, wide = ((192, 256), (4, 3)) if merge == 2 else ((192, 320), (4, 3))
        cell = ((128, 128), (3, 1)) if merge == 2 else ((128, 128), (2, 1))
        quarter, smaller = ((320, 320), (256, 256)) if merge == 2 else ((384, 384), (320, 320))
        crop = ((192, 192), (4, 2))
        number = {"source": "generated:characters", "options": {"size": [TILE, TILE], "tasks": {"read_number": 1}}}
        number["options"]["font_size"] = list(font)  # type: ignore[index]
        connector = f"pixel_shuffle({merge}x{merge}) + linear"
        parts = [f"model.vision={steps.model('pages-mae')}", f"model.text={steps.model('pages-lm')}"]
        name = f"pages-merged-{merge}"
        tested = "evaluation.tasks.{}.source.options"
        steps.train(
            "pages-crops",
            *parts,
            f"model.connector={connector}",
            override("stages.numbers.data.sources", [number]),
            override("stages.cells.data.sources", [needle(*cell, font)]),
            "stages.cells.batch_size=16",
            override("data.sources", [needle(*crop, font)]),
            override(tested.format("crops"), needle(*crop, font)["options"]),
            output=f"{name}-crops",
        )
        crops = [needle(*crop, font, 2.0), needle(*cell, font), needle(near, wide, font)]
        digits = [needle(*cell, font, 2.0, digits=[1, 3]), needle(*crop, font, digits=[1, 3])]
        steps.train(
            "pages-quarters",
            f"model.checkpoint={steps.model(name + '-crops')}",
            override("stages.crops.data.sources", crops),
            override("stages.digits.data.sources", digits),
            override("data.sources", [needle(quarter, (8, 4), font), needle(smaller, (6, 3), font)]),
            override(tested.format("quarters"), needle(quarter, (8, 4), font)["options"]),
            output=f"{name}-quarters",
        )
        page = needle((side, side), (16, 8), page_font)
        steps.train(
            "pages-dense",
            f"model.checkpoint={steps.model(name + '-quarters')}",
            override("data.sources", [page]),
            override(tested.format("needle"), page["options"]),
            "baselines=[]",
            output=name,
        )
        names.append(f"merged-{merge}x{merge}={steps.at(name)}")
    steps.run("compare", *names, output="pages-merged-compared", done="report.html")


def frozen(steps: Steps) -> None:
    steps.pretrain("pages-lm")
    for encoder in ("mae", "dino"):
        steps.pretrain(f"pages-{encoder}")
        parts = [f"model.vision={steps.model('pages-' + encoder)}", f"model.text={steps.model('pages-lm')}"]
        steps.train("pages-frozen", *parts, output=f"pages-frozen-{encoder}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    parser.add_argument("--only", choices=STUDIES, nargs="+", default=list(STUDIES), help="studies to run")
    parser.add_argument("--pages", type=int, default=400, help="pages of the frontier")
    parser.add_argument("--merge", type=int, nargs="+", choices=sorted(SCALES), default=sorted(SCALES))
    arguments = parser.parse_args()
    steps = Steps(arguments.runs)
    for study in arguments.only:
        if study == "frontier":
            frontier(steps, arguments.pages)
        elif study == "merged":
            merged(steps, arguments.merge)
        else:
            (twins if study == "twins" else frozen)(steps)


if __name__ == "__main__":
    main()
