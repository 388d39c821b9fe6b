"""Mistakes of `unclipped chat`: the image, the question, the model folder, the device."""

from __future__ import annotations

from collections.abc import Callable

from bad_input.row import (
    FOLDER,
    HUB,
    PNG,
    QKV,
    Arguments,
    Row,
    broken,
    cut_image,
    cut_weights,
    extra,
    misshaped,
    without,
)
from bad_input_support import Place

ASK = ("-q", "what?", "--max-new-tokens", "2", "--device", "cpu")


def chat(image: Callable[[Place], str], *more: str) -> Arguments:
    return lambda place: ["chat", place.models.vlm, image(place), *ASK, *more]


def large_image(place: Place) -> str:
    from PIL import Image

    Image.new("1", (30_000, 40)).save(place.folder / "large.png")
    return "large.png"


ROWS: dict[str, Row] = {
    "chat, fallback of no pattern": Row(
        chat(lambda p: p.image("a.png"), "--sparse-fallback", "never"), 2, ("--sparse-fallback: not used without",)
    ),
    "chat, image missing": Row(chat(lambda p: "no.png"), 1, ("no.png", "no such file", "check the path")),
    "chat, image empty": Row(chat(lambda p: p.write("bad.png")), 1, ("bad.png", "empty", "copy it again")),
    "chat, image cut": Row(chat(lambda p: cut_image(p, "bad.png")), 1, ("bad.png", "truncated", "copy it again")),
    "chat, header cut": Row(chat(lambda p: p.write("bad.png", PNG)), 1, ("bad.png", "cut off", "replace it")),
    "chat, no image": Row(chat(lambda p: p.write("bad.png", "hello, I am text")), 1, ("bad.png", "not an image")),
    "chat, an address": Row(chat(lambda p: "https://a.example/a.png"), 1, ("https://a.example/a.png", "download it")),
    "chat, no new tokens": Row(chat(lambda p: p.image("a.png"), "--max-new-tokens", "0"), 2, ("--max-new-tokens",)),
    "chat, a folder": Row(chat(lambda p: p.data()), 1, ("data", "is a folder", "one image")),
    "chat, 30,000 px": Row(chat(large_image), 1, ("large.png", "40x30000", "67108864 pixels or 20000 px a side")),
    "chat, empty question": Row(chat(lambda p: p.image("a.png"), "-q", " "), 2, ("question is empty", "-q")),
    "device unknown": Row(chat(lambda p: p.image("a.png"), "--device", "tpu"), 2, ("'tpu'", "cpu")),
    "device not there": Row(chat(lambda p: p.image("a.png"), "--device", "cuda:99"), 2, ("cuda:99", "not available")),
    "hub id without network, chat": Row(lambda p: ["chat", HUB, p.image("a.png"), *ASK], 1, (HUB, "without", FOLDER)),
    "model weights cut": Row(lambda p: ["chat", cut_weights(p, "vlm"), *ASK], 1, ("cut: weights cannot", "again")),
    "configuration cut": Row(
        lambda p: ["chat", p.file_of("vlm", "config.json", b'{"model_ty'), *ASK],
        1,
        ("config.json", "not valid JSON", "again"),
    ),
    "configuration of an unknown kind": Row(
        lambda p: ["chat", p.file_of("vlm", "config.json", b'{"model_type": "xyz"}'), *ASK], 1, ("config.json", "xyz")
    ),
    "chat with a language model": Row(
        lambda p: ["chat", p.models.text, *ASK], 1, ("'qwen3'", "not an assembled model", "unclipped assemble")
    ),
    "chat with an encoder": Row(lambda p: ["chat", p.models.vision, *ASK], 1, ("'dinov2'", "unclipped assemble")),
    "chat with a folder of something else": Row(lambda p: ["chat", p.data(), *ASK], 1, ("no config.json", FOLDER)),
    "chat with a file": Row(lambda p: ["chat", p.write("model.bin"), *ASK], 1, ("is a file", FOLDER)),
    "chat without a processor": Row(
        lambda p: ["chat", p.file_of("vlm", "processor_config.json"), *ASK], 1, ("processor", "again")
    ),
    "chat without a tokenizer": Row(
        lambda p: ["chat", p.file_of("vlm", "tokenizer.json"), *ASK], 1, ("tokenizer", "again")
    ),
    "chat without weights": Row(lambda p: ["chat", p.file_of("vlm", "model.safetensors"), *ASK], 1, ("safetensors",)),
    "model tensor missing": Row(
        lambda p: ["chat", broken("vlm", without(f"model.language_model.{QKV}"))(p), *ASK], 1, ("missing 1", QKV)
    ),
    "model tensor extra": Row(lambda p: ["chat", broken("vlm", extra)(p), *ASK], 1, ("unexpected 1: surplus",)),
    "model tensor misshaped": Row(
        lambda p: ["chat", broken("vlm", misshaped(f"model.language_model.{QKV}"))(p), *ASK], 1, ("misshaped 1", QKV)
    ),
}
