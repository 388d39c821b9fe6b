"""Mutants of the source: thirty small faults, each of which a fast test should notice.

Run by hand, never in CI: `python tests/mutants.py --results mutants.json`. Fifteen faults are written down here,
fifteen are drawn with a seed from comparisons and index arithmetic. Each is made in a scratch copy of the tree. The
fast tests of its room run first and stop at the first failure. Only a survivor meets the whole fast tier. Results are
written after every mutant: a second call with the same file skips what was killed or survived. After a change of tests
take a new file.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("attention", "images", "encoding", "objectives", "training", "evaluation")
SEED, DRAWN = 20, 15


@dataclass(frozen=True)
class Mutant:
    """One fault: the only occurrence of `before` in a file of src/unclipped, on its line if one is given."""

    name: str
    file: str
    before: str
    after: str
    line: int | None = None

    @property
    def room(self) -> str:
        """The folder under tests/ that is tried first."""
        return self.file.split("/")[0]

    def applied(self, source: str) -> str:
        """The faulty source. Raises ValueError where `before` is not there exactly once."""
        lines = source.splitlines(keepends=True)
        first, last = (0, len(lines)) if self.line is None else (self.line - 1, self.line)
        part = "".join(lines[first:last])
        if part.count(self.before) != 1:
            raise ValueError(
                f"{self.file}: {self.before!r} occurs {part.count(self.before)} times, expected once; the code has "
                f"moved, so rewrite the mutant '{self.name}'"
            )
        return "".join(lines[:first]) + part.replace(self.before, self.after) + "".join(lines[last:])


BY_HAND = [
    Mutant(
        "window one token too long",
        "attention/patterns.py",
        "np.abs(query[:, None] - key[None, :]) < self.size",
        "np.abs(query[:, None] - key[None, :]) <= self.size",
    ),
    Mutant(
        "images see each other",
        "attention/patterns.py",
        "return (both & overlap(query.image, key.image))[None]",
        "return both[None]",
    ),
    Mutant(
        "rows and columns of a grid swapped",
        "attention/layout.py",
        "places[:, span] = grid[:, : segment.length]",
        "places[:, span] = grid[[0, 2, 1], : segment.length]",
    ),
    Mutant("causal mask flipped", "encoding/collate.py", "dtype=torch.bool).tril()", "dtype=torch.bool).triu()"),
    Mutant(
        "question blocks see each other",
        "encoding/collate.py",
        "seen = causal & related & valid",
        "seen = causal & valid",
    ),
    Mutant(
        "given positions dropped",
        "encoding/collate.py",
        "position_ids[row, :size] = torch.tensor(example.positions)",
        "pass",
    ),
    Mutant("images of a batch in reverse", "encoding/collate.py", "torch.cat(pixels)", "torch.cat(pixels[::-1])"),
    Mutant("the end of an answer unsupervised", "encoding/chat.py", "return index + 1", "return index"),
    Mutant(
        "one patch row too few",
        "images/rules.py",
        "return target_height // rule.patch_size[0], target",
        "return target_height // rule.patch_size[0] - 1, target",
    ),
    Mutant("pixels of a patch transposed", "images/prepare.py", "transpose(0, 2, 4, 1, 3)", "transpose(0, 2, 4, 3, 1)"),
    Mutant("labels not shifted", "objectives/language_model.py", "logits[:, :-1]", "logits[:, 1:]"),
    Mutant(
        "visible patches as targets",
        "objectives/masked_autoencoder.py",
        "hidden=order[:, shown:] if",
        "hidden=order[:, :-shown] if",
    ),
    Mutant(
        "each image with its neighbour's caption",
        "objectives/pair_losses.py",
        "device=some.device) + first + start",
        "device=some.device).roll(1) + first + start",
    ),
    Mutant(
        "processes share their micro-batches",
        "training/batches.py",
        "(micro * self.world_size + self.rank)",
        "(micro * self.world_size)",
    ),
    Mutant(
        "lower is better",
        "evaluation/paired.py",
        "(difference.value > 0.0) == self",
        "(difference.value > 0.0) != self",
    ),
]

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip


def places(tree: ast.Module) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Expressions of a file that can be changed, each with its faulty form: comparisons, and + or − inside an index."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            yield node, ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
        if isinstance(node, ast.Subscript):
            for inner in ast.walk(node.slice):
                if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add | ast.Sub):
                    turned = ast.Sub() if isinstance(inner.op, ast.Add) else ast.Add()
                    yield inner, ast.BinOp(inner.left, turned, inner.right)


def drawn(root: Path, seed: int = SEED, count: int = DRAWN) -> list[Mutant]:
    """`count` mutants, rooms in turn, each expression on one line and the only one of its text there."""
    generator, found, package = random.Random(seed), [], root / "src" / "unclipped"
    pools: dict[str, list[Mutant]] = {}
    for room in ROOMS:
        pool = []
        for path in sorted((package / room).rglob("*.py")):
            source, file = path.read_text(), str(path.relative_to(package))
            for node, faulty in places(ast.parse(source)):
                before = ast.get_source_segment(source, node) or ""
                line = source.splitlines()[node.lineno - 1]
                if node.lineno == node.end_lineno and line.count(before) == 1 and '"' not in before:
                    if ast.unparse(ast.parse(before)) != ast.unparse(node):
                        continue  # columns inside an f-string are not those of the line
                    after = ast.unparse(ast.fix_missing_locations(faulty))
                    pool.append(Mutant(f"drawn {file}:{node.lineno}", file, before, f"({after})", node.lineno))
        generator.shuffle(pool)
        pools[room] = pool
    for number in range(count):
        found.append(pools[ROOMS[number % len(ROOMS)]].pop())
    return found


def fast_tests(tree: Path, *targets: str, limit: float) -> tuple[str, str]:
    """Outcome (passed, failed, timed out or broken) of the fast tests, with the line of the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *targets]
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "timed out", f"more than {limit:.0f} s"
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    outcome = {0: "passed", 1: "failed", 2: "failed" if failed else "broken"}.get(run.returncode, "broken")
    return outcome, failed[0] if failed else run.stdout[-300:] + run.stderr[-300:]


def try_out(mutant: Mutant, tree: Path, limit: float) -> dict[str, object]:
    """Apply a mutant in the scratch copy, run its tests and take it back."""
    path, started = tree / "src" / "unclipped" / mutant.file, time.monotonic()
    if not path.is_file():
        return asdict(mutant) | {"verdict": "gone", "by": f"{mutant.file}: no such file; rewrite the mutant"}
    source = path.read_text()
    try:
        faulty = mutant.applied(source)
    except ValueError as error:
        return asdict(mutant) | {"verdict": "gone", "by": str(error)}
    ast.parse(faulty)
    path.write_text(faulty)
    try:
        outcome, by = fast_tests(tree, f"tests/{mutant.room}", limit=limit)
        if outcome == "passed":
            outcome, by = fast_tests(tree, "tests", limit=2 * limit)
    finally:
        path.write_text(source)
    # A test that never ends has noticed the fault only where the same tests end without it; a person decides.
    if outcome == "failed":
        test = by.split(" ", 1)[1].split(" - ")[0]
        if fast_tests(tree, test, limit=limit)[0] != "passed":  # it fails without the fault too: no kill
            outcome, by = "broken", f"fails without the mutant: {by}"
    verdict = {"passed": "survived", "failed": "killed"}.get(outcome, outcome)
    return asdict(mutant) | {"verdict": verdict, "by": by, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    """Try every mutant that has no verdict yet; the status is 1 where one was not killed."""
    parser = argparse.ArgumentParser(description="Thirty faults in the source, each to be noticed by a fast test.")
    parser.add_argument("--results", type=Path, default=Path("mutants.json"), help="file of verdicts, kept and read")
    parser.add_argument("--limit", type=float, default=900, help="seconds that the fast tests of a room may take")
    parser.add_argument("--only", default="", help="mutants whose file or name holds this text")
    parser.add_argument("--list", action="store_true", help="name the mutants and whether each still applies")
    options = parser.parse_args()
    mutants = [mutant for mutant in BY_HAND + drawn(ROOT) if options.only in f"{mutant.file} {mutant.name}"]
    if options.list:
        for mutant in mutants:
            mutant.applied((ROOT / "src" / "unclipped" / mutant.file).read_text())
            print(f"{mutant.name}: {mutant.file}: {mutant.before.splitlines()[0]} -> {mutant.after.splitlines()[0]}")
        return 0
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    clean: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
        for mutant in mutants:
            known = results.get(mutant.name, {})
            if known.get("after") == mutant.after and known.get("verdict") in ("killed", "survived"):
                continue
            if mutant.room not in clean:  # tests that fail without a fault would kill every mutant
                clean[mutant.room], by = fast_tests(tree, f"tests/{mutant.room}", limit=options.limit)
                if clean[mutant.room] != "passed":
                    print(f"tests/{mutant.room}: {clean[mutant.room]} without any mutant: {by}; mend them first")
            if clean[mutant.room] != "passed":
                continue
            results[mutant.name] = try_out(mutant, tree, options.limit)
            part = options.results.with_suffix(".part")
            part.write_text(json.dumps(results, indent=1))
            part.replace(options.results)
            print(f"{results[mutant.name]['verdict']:9} {mutant.name}: {results[mutant.name]['by']}", flush=True)
    verdicts = [results.get(mutant.name, {}).get("verdict", "not tried") for mutant in mutants]
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in sorted(set(verdicts))))
    return 0 if set(verdicts) == {"killed"} else 1


if __name__ == "__main__":
    sys.exit(main())
