"""A folder prepared as the pages say: the files they show, the images those name, tiny models in place of real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from docs_pages import PAGES, blocks
from PIL import Image

from support.original_vit import Draw, OriginalVit
from support.tiny_models import tiny_encoder, tiny_image, tiny_lm, tiny_tokenizer, tiny_vlm
from unclipped.encoders.spec import declare_objective
from unclipped.images.config import ImageRule
from unclipped.objectives.contrastive import ContrastiveObjective
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.text_side import save_text_side
from unclipped.objectives.trunk import build_trunk, save_trunk


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; tests take a copy."""
    folder = tmp_path_factory.mktemp("documentation")
    for page in PAGES:
        for block in blocks(page):
            if block.file and block.language in ("yaml", "jsonl"):
                path = folder / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
    for number, path in enumerate(sorted(folder.rglob("*.jsonl"))):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for name in {name for row in rows for name in images_in(row)}:
            image = path.parent / name
            image.parent.mkdir(exist_ok=True)
            tiny_image(32, 48, offset=8 * number + len(name)).save(image)
    more_rows(folder / "my-folder" / "train.jsonl")
    (folder / "my-text").mkdir()
    for number in range(4):
        (folder / "my-text" / f"{number}.txt").write_text(f"the red circle number {number} and the blue square. " * 40)
    for split in ("train", "test"):
        for number in range(8):
            photo = folder / "my-photos" / split / ("cats" if number % 2 else "dogs") / f"{number}.png"
            photo.parent.mkdir(parents=True, exist_ok=True)
            tiny_image(32, 48, offset=8 * number + len(split)).save(photo)
    for split in ("train", "val"):
        for number in range(8):
            photo = folder / "my-imagenet" / split / ("n02123045" if number % 2 else "n02084071") / f"{number}.JPEG"
            photo.parent.mkdir(parents=True, exist_ok=True)
            tiny_image(32, 48, offset=8 * number + len(split)).save(photo)
    lines = "n02084071 dog, domestic dog\nn02123045 tabby, tabby cat\n"
    (folder / "my-imagenet" / "LOC_synset_mapping.txt").write_text(lines)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (folder / "my-ade20k" / kind / split).mkdir(parents=True)
        for number in range(3):
            tiny_image(16, 24, offset=number).save(folder / "my-ade20k" / "images" / split / f"{number}.jpg")
            mask = Image.new("L", (24, 16), number)
            mask.paste(150, (0, 0, 12, 8))
            mask.save(folder / "my-ade20k" / "annotations" / split / f"{number}.png")
    captions = [
        {"id": split, "image": f"{split}/dogs/0.png", "question": "", "answer": f"a {split} dog"}
        for split in ("train", "test")
    ]
    (folder / "my-captions").mkdir()
    shutil.copytree(folder / "my-photos", folder / "my-captions", dirs_exist_ok=True)
    (folder / "my-captions" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    tiny_clip(folder / "my-clip")
    tiny_lm(folder / "my-lm")
    teacher_weights(folder / "my-weights.pth")
    tiny_encoder(folder / "my-vit", image_size=16, patch_size=8)
    tiny_vlm(folder / "quickstart", output=folder / "quickstart" / "model")
    shutil.move(folder / "quickstart" / "text", folder / "quickstart" / "language-model" / "model")
    (folder / "quickstart" / "examples").mkdir()
    tiny_image(24, 64).save(folder / "quickstart" / "examples" / "1.png")
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the prepared folder, as the working directory."""
    folder = shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("UNCLIPPED_DATA", raising=False)
    return folder


def tiny_clip(folder: Path) -> None:
    """An encoder as pretraining on captions saves it, untrained."""
    shape = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    trunk, tokenizer = build_trunk(shape, image_size=16), tiny_tokenizer()
    pairs = PairsConfig(embedding_size=8, context_length=32, text_width=16, text_layers=1, text_heads=2)
    rule = ImageRule(rule="squash", size=(16, 16), patch_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    declare_objective(trunk.encoder.model.config, "contrastive")
    save_trunk(trunk, folder, rule)
    model = ContrastiveObjective.build(trunk, tokenizer, pairs).model
    save_text_side(folder, model, tokenizer, rule, objective="contrastive", pairs=pairs)


def teacher_weights(path: Path) -> None:
    """A DINOv2 teacher with its heads, as a training of the original code leaves it."""
    sizes = OriginalVit(heads=4, is_gated=True, chunks=2)
    teacher = {f"backbone.{name}": value for name, value in sizes.tensors().items()}
    for number, head in enumerate(("dino_head", "ibot_head")):
        teacher |= {f"{head}.{name}": value for name, value in Draw(number).head(sizes.width, 16, 8, 12).items()}
    torch.save({"teacher": teacher}, path)


def images_in(row: dict) -> list[str]:
    """Paths of the images that a row names."""
    named = row.get("image") or row.get("images") or []
    return [named] if isinstance(named, str) else list(named)


def more_rows(path: Path) -> None:
    """Repeat the two rows of the page for other meters, so that there is something to split and to batch."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    copies = [{**row, "id": row["id"].replace("17", str(meter))} for meter in range(17, 25) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in copies))
