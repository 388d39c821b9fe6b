"""Mistakes of `unclipped pretrain`: texts, images, pairs, phases, shapes, where to start from."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import Any

from bad_input.row import PNG, Arguments, Row
from bad_input_support import Place

DOCUMENTS = '{"text": "a text of some words, longer than a block of sixteen tokens in any tokenizer"}\n' * 9
PAIRS = ["pretrain", "clothing-contrastive", "training.threads=1"]


def encoder(**fields: Any) -> Arguments:
    """Pretraining of a tiny encoder on generated images."""
    given = {
        "objective": "dinov2",
        "shape": {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "dinov2": {"prototypes": 8, "head_hidden": 16, "bottleneck": 8, "local_crops": 1, "local_size": 16},
        "image_size": 32,
    }
    return lambda place: ["pretrain", place.pretraining("generated:shapes", **(given | fields)), "--output", "out"]


def pretrain_pairs(prepare: Callable[[Place], str]) -> Arguments:
    """Pretraining on pairs from the source that `prepare` makes."""
    return lambda place: [*PAIRS, f"data.sources=[{{source: {prepare(place)}}}]", "--output", "out"]


def images_alone(place: Place) -> str:
    for name in "ab":
        place.image(f"photos/{name}.png")
    return "photos"


def corrupt_shard(place: Place) -> str:
    """A tar shard whose only image is a damaged PNG."""
    with tarfile.open(place.folder / "shard.tar", "w") as archive:
        for name, content in (("0001.png", PNG + b"no image"), ("0001.txt", b"a boat")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return "shard.tar"


def language_model(place: Place) -> list[Any]:
    """Pretraining of a tiny language model, without a mistake."""
    return ["pretrain", place.pretraining(place.write("a.jsonl", DOCUMENTS)), "--output", "out"]


ROWS: dict[str, Row] = {
    "pretrain, text missing": Row(
        lambda p: ["pretrain", p.pretraining("nothing.txt"), "--output", "out"], 1, ("nothing.txt", "no such file")
    ),
    "pretrain, text empty": Row(
        lambda p: ["pretrain", p.pretraining(p.write("a.txt", " \n")), "--output", "out"], 1, ("a.txt", "no sample")
    ),
    "pretrain, a single line of text": Row(
        lambda p: ["pretrain", p.pretraining(p.write("a.txt", "short\n")), "--output", "out"], 1, ("document",)
    ),
    "pretrain images, none there": Row(
        lambda p: [
            "pretrain",
            p.pretraining(
                p.data({"id": "s1", "question": "q", "answer": "a"}), shape={}, objective="masked_autoencoder"
            ),
            "--output",
            "out",
        ],
        1,
        ("image",),
    ),
    "pretrain phases of a language model": Row(
        lambda p: ["pretrain", p.pretraining("a.txt", phases=[{"image_size": 64, "steps": 1}]), "--output", "out"],
        2,
        ("phases", "language_model trains no encoder"),
    ),
    "phase that is no larger": Row(encoder(phases=[{"image_size": 32, "steps": 1}]), 2, ("phases.0.image_size", "32")),
    "phase that patches do not fill": Row(
        encoder(phases=[{"image_size": 36, "steps": 1}]), 2, ("phases.0.image_size", "36 px", "8×8")
    ),
    "phase field unknown": Row(
        encoder(phases=[{"image_sise": 64, "steps": 1}]), 2, ("phases.0.image_sise", "did you mean 'image_size'")
    ),
    "init missing": Row(encoder(shape={}, init="no/where/at/all"), 1, ("init: no/where/at/all", "no such folder")),
    "init is no encoder": Row(lambda p: encoder(shape={}, init=str(p.models.text))(p), 1, ("init", "llm:")),
    "init with a shape": Row(
        lambda p: encoder(init=str(p.models.vision))(p), 2, ("shape.hidden_size", "has its shape already")
    ),
    "init is a baseline": Row(
        lambda p: encoder(shape={}, init=str(p.models.clip))(p),
        2,
        ("init", "comparing images with text", "`baseline: true` beside init"),
    ),
    "shape of a wrong type": Row(
        lambda p: [*language_model(p)[:2], "shape.hidden_size=big", "--output", "out"], 2, ("shape", "qwen3")
    ),
    "shape of a negative number of layers": Row(
        lambda p: [*language_model(p)[:2], "shape.num_hidden_layers=-1", "--output", "out"],
        2,
        ("shape.num_hidden_layers", "from 1 to 1,024", "found -1"),
    ),
    "shape of an encoder with a negative width": Row(
        encoder(shape={"hidden_size": -8}), 2, ("shape.hidden_size", "found -8")
    ),
    "shape of a gigantic encoder": Row(
        encoder(shape={"hidden_size": 120_000_000, "patch_size": 8}), 2, ("shape", "parameters", "the limit is")
    ),
    "shape whose heads do not divide": Row(
        lambda p: [*language_model(p)[:2], "shape.num_key_value_heads=3", "--output", "out"],
        2,
        ("shape", "qwen3"),
    ),
    "layer decay without an encoder": Row(
        lambda p: [*language_model(p)[:2], "training.optimizer.layer_decay=0.9", "--output", "out"],
        2,
        ("layer_decay", "vision encoder", "leave them out"),
    ),
    "clipping by module without a norm": Row(
        lambda p: [*language_model(p)[:2], "clip_per_module=true", "clip_norm=null", "--output", "out"],
        2,
        ("clip_per_module", "clip_norm", "give one"),
    ),
    "a final decay beside one for each part": Row(
        lambda p: [
            *language_model(p)[:2],
            "training.optimizer={weight_decay: {text: 0.1}, final_weight_decay: 0.2}",
            "--output",
            "out",
        ],
        2,
        ("final_weight_decay", "one number"),
    ),
    "a final rate above the first": Row(
        lambda p: [*language_model(p)[:2], "final_learning_rate=9", "--output", "out"],
        2,
        ("final_learning_rate", "found 9"),
    ),
    "tokenizer missing": Row(
        lambda p: [*language_model(p)[:2], "tokenizer.source=no/where", "--output", "out"],
        1,
        ("tokenizer.source no/where", "tokenizer.json"),
    ),
    "pairs wanted, images alone": Row(pretrain_pairs(images_alone), 1, ("sample ", "exactly one assistant turn", "0")),
    "pair without a caption": Row(
        pretrain_pairs(lambda p: p.data({"image": "good.png"}, {"image": "good.png", "caption": "a"}) + "/train.jsonl"),
        1,
        ("train.jsonl",),
    ),
    "pair without a caption later on": Row(
        pretrain_pairs(lambda p: p.data({"image": "good.png", "caption": "a"}, {"image": "good.png"})),
        1,
        ("data/train.jsonl, line 2", "'caption'", "missing"),
    ),
    "corrupt tar member": Row(pretrain_pairs(corrupt_shard), 1, ("shard shard.tar, member 0001.png",)),
    "filter keeps nothing of what an encoder learns from": Row(
        lambda p: [
            *("pretrain", "clothing-mae", f"data.sources=[{{source: {images_alone(p)}}}]"),
            *("data.filter={kind: text_rich, threshold: 1.0}", "training.threads=1", "--output", "out"),
        ],
        1,
        ("photos", "keeps none of 2 images"),
    ),
}
