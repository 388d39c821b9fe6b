"""Reading a number on a page of 4,096 visual tokens: the studies of sparse prefill on trained models.

twins     the same model lengthened to whole pages under a sparse plan and densely, and blind; 2,000 pages
merged    all tokens with sparse prefill against 2x2- and 4x4-merged tokens with dense prefill: the same pages, at 1.375
          and 1.625 times the size, so that time to first token is equal (`unclipped prefill bench` on each shows it)
frontier  patterns at about equal density on the dense twin, none of them trained for, with one that is searched
frozen    the same reading by a linear connector between frozen parts

Every step is one command of `unclipped` on one thread; finished ones are kept, interrupted ones go on when the line is
run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from unclipped.models.checkpoint import load_model
from unclipped.recipes.loading import read_recipe

EXAMPLES = """examples:
  python benchmarks/pages.py --runs runs --jobs 2
  python benchmarks/pages.py --runs runs --only frontier --pages 400
"""
STUDIES = ("twins", "merged", "frontier", "frozen")
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
    "global_text + topk(4)",
    "global_text + topk(6)",
    "vertical_slash(3, 3)",
    "global_text + vertical_slash(2, 2)",
    "global_text + vertical_slash(3, 3)",
    "global_text + vertical_slash(4, 4)",
    "full",
)
Cells = tuple[int, int]
SIDES: dict[int, dict[Cells, tuple[int, int]]] = {
    2: {
        (2, 1): (96, 96),
        (2, 2): (96, 192),
        (4, 2): (176, 176),
        (6, 3): (272, 272),
        (8, 4): (352, 352),
        (8, 8): (352, 704),
        (16, 4): (704, 352),
        (16, 8): (704, 704),
    },
    4: {
        (2, 1): (96, 96),
        (2, 2): (96, 192),
        (4, 2): (192, 192),
        (6, 3): (320, 320),
        (8, 4): (416, 416),
        (8, 8): (416, 832),
        (16, 4): (832, 416),
        (16, 8): (832, 832),
    },
}
"""Merging → (rows, columns) of words → (height, width) in px; multiples of what one token covers. A single word has the
picture of the fewest. The other's page has 512 by 512."""
FONTS = {2: (18, 25), 4: (21, 29)}  # px, where the other sees 13 to 18


class Steps:
    """Runs commands, one thread each. Of studies beside each other the second to want a step waits for the first."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def lock(self, output: str) -> threading.Lock:
        return self._locks[output]

    def at(self, name: str) -> str:
        return str(self.runs / name)

    def model(self, name: str) -> str:
        return str(self.runs / name / "model")

    def run(self, command: str, *arguments: str, output: str, done: str) -> None:
        """One command, unless the file `done` in its folder shows that it has ended."""
        with self.lock(output):
            self._run(command, *arguments, output=output, done=done)

    def _run(self, command: str, *arguments: str, output: str, done: str) -> None:
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


def enlarged(sources: Any, merge: int) -> Any:
    """The sources of a recipe with pictures and type for a merging model: the same words in the same cells."""
    changed = []
    for source in sources:
        options = dict(source["options"])
        cells = options.get("cells", min(SIDES[merge]))
        options |= {"size": list(SIDES[merge][tuple(cells)]), "font_size": list(FONTS[merge])}
        changed.append({**source, "options": options})
    return changed


def override(path: str, value: Any) -> str:
    return f"{path}={json.dumps(value)}"


def prepare_crops(steps: Steps) -> None:
    steps.pretrain("pages-lm")
    steps.pretrain("pages-mae")
    parts = [f"model.vision={steps.model('pages-mae')}", f"model.text={steps.model('pages-lm')}"]
    steps.train("pages-crops", *parts)


def train_pages(steps: Steps, twin: str) -> None:
    prepare_crops(steps)
    steps.train("pages-quarters", f"model.checkpoint={steps.model('pages-crops')}")
    steps.train(twin, f"model.checkpoint={steps.model('pages-quarters')}")


def twins(steps: Steps) -> None:
    for twin in ("sparse", "dense"):  # sparse first, so that a study beside this one has the dense twin to train
        train_pages(steps, f"pages-{twin}")
    named = [f"{twin}={steps.at('pages-' + twin)}" for twin in ("dense", "sparse")]
    blind = f"blind={steps.at('pages-sparse')}/baselines/blind"
    steps.run("compare", *named, blind, output="pages-twins", done="report.html")


def frontier(steps: Steps, pages: int) -> None:
    steps.pretrain("pages-mae")
    train_pages(steps, "pages-dense")
    dense = steps.model("pages-dense")
    size = "task.source.options={size: [512, 512], cells: [16, 8]}"
    candidates = [word for text in CANDIDATES for word in ("--candidate", text)]
    blocks = ["--key-block", "64", "--query-block", "128", "--threads", "1"]
    bounds = ["--bound", "kl=0.05", "--density", "0.25", "--limit", "64", "--no-rulers"]
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


def take_apart(steps: Steps, model: str, into: str) -> tuple[str, str]:
    """Saves the encoder and the language model of an assembled model by themselves; returns their folders."""
    vision, text = str(steps.runs / into / "vision"), str(steps.runs / into / "text")
    with steps.lock(into):
        if not (steps.runs / into / "done").exists():
            whole, processor = load_model(model)
            whole.model.vision_tower.model.save_pretrained(vision)
            processor.image_processor.save_pretrained(vision)
            weights = {name.replace("language_model.", ""): value for name, value in whole.state_dict().items()}
            decoder = AutoModelForCausalLM.from_config(whole.config.text_config)
            decoder.load_state_dict({name: weights[name] for name in decoder.state_dict()})
            decoder.save_pretrained(text)
            processor.tokenizer.save_pretrained(text)
            (steps.runs / into / "done").touch()
    return vision, text


def train_merged(steps: Steps, merge: int) -> str:
    """From the parts of the model that has read single words with all tokens: a new connector, which gets 300 steps of
    the same words, and from there step for step what pages-dense has had, on larger pages. Returns its folder's name.
    """
    vision, text = take_apart(steps, str(steps.runs / "pages-crops" / "stages" / "01-words"), "pages-words-parts")
    name = f"pages-merged-{merge}"
    stages = read_recipe("pages-crops")["stages"][1:]
    stages[0] = {key: value for key, value in stages[0].items() if key != "auxiliary"} | {"steps": 300}
    steps.train(
        "pages-crops",
        f"model.vision={vision}",
        f"model.text={text}",
        f"model.connector=pixel_shuffle({merge}x{merge}) + linear",
        *enlarging("pages-crops", merge, stages),
        output=f"{name}-crops",
    )
    before = f"{name}-crops"
    for recipe, output in (("pages-quarters", f"{name}-quarters"), ("pages-dense", name)):
        larger = enlarging(recipe, merge, read_recipe(recipe)["stages"])
        steps.train(recipe, f"model.checkpoint={steps.model(before)}", *larger, "baselines=[]", output=output)
        before = output
    return name


def enlarging(recipe: str, merge: int, stages: Any) -> list[str]:
    """Overrides by which a recipe of all tokens, with these stages, trains and tests a merging model."""
    whole = read_recipe(recipe)
    larger = [
        {**stage, "data": {**stage["data"], "sources": enlarged(stage["data"]["sources"], merge)}}
        if "data" in stage
        else stage
        for stage in stages
    ]
    tasks = [{**task, "source": enlarged([task["source"]], merge)[0]} for task in whole["evaluation"]["tasks"]]
    changes = {
        "data.sources": enlarged(whole["data"]["sources"], merge),
        "stages": larger,
        "evaluation.tasks": tasks,
    }
    return [override(path, value) for path, value in changes.items()]


def merged(steps: Steps, merges: Iterable[int]) -> None:
    steps.pretrain("pages-mae")
    prepare_crops(steps)
    merging = {f"merged-{merge}x{merge}": train_merged(steps, merge) for merge in merges}
    train_pages(steps, "pages-sparse")
    named = [f"{name}={steps.at(run)}" for name, run in {"all": "pages-sparse", **merging}.items()]
    steps.run("compare", *named, output="pages-merged-compared", done="report.html")


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
    parser.add_argument("--merge", type=int, nargs="+", choices=sorted(SIDES), default=sorted(SIDES))
    parser.add_argument("--jobs", type=int, default=1, help="studies beside each other, one core each")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs: at least 1, found {arguments.jobs}")
    steps = Steps(arguments.runs)
    studies: dict[str, Callable[[], None]] = {
        "twins": lambda: twins(steps),
        "merged": lambda: merged(steps, arguments.merge),
        "frontier": lambda: frontier(steps, arguments.pages),
        "frozen": lambda: frozen(steps),
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for ended in [pool.submit(studies[study]) for study in studies if study in arguments.only]:
            ended.result()


if __name__ == "__main__":
    main()
