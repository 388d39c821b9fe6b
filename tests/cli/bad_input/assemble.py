"""Mistakes of `unclipped assemble`: the two checkpoints and the options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bad_input.row import FOLDER, HUB, QKV, Arguments, Row, broken, cut_weights, extra, misshaped, the, without
from bad_input_support import Place


def assemble(vision: Callable[[Place], Any], text: Callable[[Place], Any], *more: str) -> Arguments:
    return lambda place: ["assemble", "--vision", vision(place), "--text", text(place), "--output", "out", *more]


ROWS: dict[str, Row] = {
    "option of another kind of encoder": Row(
        assemble(the("vision"), the("text"), "--patch-size", "8"), 2, ("--patch-size: not used for an encoder", "llm:")
    ),
    "rotary form of another kind of encoder": Row(
        assemble(the("vision"), the("text"), "--rope", "axial"), 2, ("--rope: not used for an encoder", "llm:")
    ),
    "encoder without a name": Row(
        assemble(lambda p: "llm:", the("text")), 2, ("field 'vision.llm'", "at least 1 character")
    ),
    "more layers than there are": Row(
        assemble(lambda p: f"llm:{the('text')(p)}", the("text"), "--layers", "99"), 2, ("layers: ", "found 99", "1 to")
    ),
    "connector unknown": Row(assemble(the("vision"), the("text"), "--connector", "mpl(2)"), 2, ("mpl", "mlp")),
    "hub id without network, vision": Row(assemble(lambda p: HUB, the("text")), 1, (HUB, "without network", FOLDER)),
    "hub id without network, text": Row(assemble(the("vision"), lambda p: HUB), 1, (HUB, "without network", FOLDER)),
    "hub id without network, llm": Row(assemble(lambda p: f"llm:{HUB}", the("text")), 1, (HUB, "without net", FOLDER)),
    "no hub id and no folder": Row(assemble(lambda p: "./my-vit", the("text")), 1, ("./my-vit", "no such folder")),
    "a contrastive encoder": Row(
        assemble(the("clip"), the("text")), 2, ("contrastive", "baseline: true", "--baseline")
    ),
    "language model as encoder": Row(assemble(the("text"), the("text")), 1, ("qwen3", "llm:")),
    "encoder as language model": Row(assemble(the("vision"), the("vision")), 1, ("dinov2", "language model")),
    "vision tensor missing": Row(
        assemble(broken("vision", without("layernorm.weight")), the("text")), 1, ("tampered", "missing 1", "layernorm")
    ),
    "vision tensor extra": Row(
        assemble(broken("vision", extra), the("text")), 1, ("tampered", "unexpected 1", "surpl")
    ),
    "vision tensor misshaped": Row(
        assemble(broken("vision", misshaped("layernorm.weight")), the("text")), 1, ("misshaped 1", "(3, 5)", "(32,)")
    ),
    "llm tensor missing": Row(
        assemble(broken("text", without(f"model.{QKV}"), "llm:"), the("text")), 1, ("tampered", "missing 1", QKV)
    ),
    "llm tensor extra": Row(assemble(broken("text", extra, "llm:"), the("text")), 1, ("tampered", "unexpected 1")),
    "llm tensor misshaped": Row(
        assemble(broken("text", misshaped(f"model.{QKV}"), "llm:"), the("text")), 1, ("tampered", "misshaped 1", QKV)
    ),
    "text tensor missing": Row(
        assemble(the("vision"), broken("text", without(f"model.{QKV}"))), 1, ("tampered", "missing 1", QKV)
    ),
    "weights cut": Row(assemble(the("vision"), lambda p: cut_weights(p, "text")), 1, ("cut: weights cannot", FOLDER)),
    "vision weights cut": Row(assemble(lambda p: cut_weights(p, "vision"), the("text")), 1, ("cut: weights", FOLDER)),
    "language model without a tokenizer": Row(
        assemble(the("vision"), lambda p: p.file_of("text", "tokenizer.json", None, "tokenizer_config.json")),
        1,
        ("tokenizer.json", "tokenizer_config.json"),
    ),
}
