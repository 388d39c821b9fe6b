"""The place a newcomer's mistakes are made in: tiny models, a good data set, and the command line run in process."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.tiny_models import tiny_encoder, tiny_image, tiny_lm, tiny_tokenizer, tiny_vlm


@dataclass(frozen=True)
class Models:
    """Folders of tiny models, made once."""

    text: Path
    vision: Path
    clip: Path
    bare: Path
    """A language model whose tokenizer has neither a padding token nor a chat template."""
    vlm: Path


def make_models(folder: Path) -> Models:
    """Build and save them all."""
    tiny_vlm(folder / "parts", output=folder / "vlm")
    tiny_lm(folder / "bare", tokenizer=tiny_tokenizer(compact=False, pad=False))
    return Models(
        text=folder / "parts" / "text",
        vision=tiny_encoder(folder / "vision"),
        clip=tiny_encoder(folder / "clip", "clip_vision_model"),
        bare=folder / "bare",
        vlm=folder / "vlm",
    )


class Place:
    """A working folder (the current one) and the tiny models."""

    def __init__(self, folder: Path, models: Models) -> None:
        self.folder, self.models = folder, models

    def write(self, name: str, content: str | bytes = "") -> str:
        """A file of this content; -> its name."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    def image(self, name: str, height: int = 16, width: int = 16) -> str:
        """An image file of noise, height x width px; -> its name."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny_image(height, width).save(path)
        return name

    def data(self, *rows: dict[str, Any] | str, name: str = "data") -> str:
        """A folder with train.jsonl and val.jsonl of these rows (four good ones by default); -> its name."""
        if not rows:
            rows = tuple(
                {"id": f"s{i}", "image": "good.png", "question": f"what {i}", "answer": str(i)} for i in range(4)
            )
        text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        for split in ("train", "val"):
            self.write(f"{name}/{split}.jsonl", text)
        if not (self.folder / name / "good.png").exists():
            self.image(f"{name}/good.png")
        return name

    def recipe(self, data: str = "", name: str = "recipe.yaml", **changes: Any) -> str:
        """A two-step training recipe that starts from the assembled model; -> its name."""
        source = data or self.data()
        recipe: dict[str, Any] = {
            "model": {"checkpoint": str(self.models.vlm)},
            "data": {"sources": [{"source": source}]},
            "stages": [{"name": "all", "train": {"connector": 1e-3, "text": 1e-3}, "steps": 2, "batch_size": 2}],
            "training": {"threads": 1, "device": "cpu", "log_every_steps": 1},
        }
        return self.write(name, yaml.safe_dump(recipe | changes))

    def pretraining(self, data: str, name: str = "pretrain.yaml", **changes: Any) -> str:
        """A two-step recipe of a tiny language model; -> its name."""
        recipe: dict[str, Any] = {
            "kind": "pretrain",
            "objective": "language_model",
            "shape": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2},
            "data": {"sources": [{"source": data}]},
            "steps": 2,
            "batch_size": 2,
            "block_length": 16,
            "training": {"threads": 1, "device": "cpu"},
        }
        return self.write(name, yaml.safe_dump(recipe | changes))

    def file_of(self, model: str, file: str, content: bytes | None = None, *others: str, name: str = "changed") -> str:
        """A copy of a model folder in which `file` has other content, or is gone as `others` are; -> its name."""
        shutil.copytree(getattr(self.models, model), self.folder / name)
        for path in (file, *others):
            (self.folder / name / path).unlink()
        if content is not None:
            (self.folder / name / file).write_bytes(content)
        return name

    def tampered(self, model: Path, change: Any, name: str = "tampered") -> str:
        """A copy of a model folder whose tensors (a dictionary) went through `change`; -> its name."""
        from safetensors.torch import load_file, save_file

        shutil.copytree(model, self.folder / name)
        path = self.folder / name / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return name


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    status: int
    out: str
    err: str


def unclipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Outcome:
    """Run the command line in this process."""
    from unclipped.cli.main import main

    monkeypatch.setattr(sys, "argv", ["unclipped", *map(str, arguments)])
    capsys.readouterr()
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    captured = capsys.readouterr()
    return Outcome(status, captured.out, captured.err)


def expect_error(outcome: Outcome, status: int, *pieces: str) -> None:
    """One line that begins with `error:` and nothing else on the error stream, the status, and what it must say."""
    assert outcome.status == status, outcome
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome.out + outcome.err
    for piece in pieces:
        assert piece in lines[0], lines[0]
