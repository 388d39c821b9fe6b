"""Mistakes of `unclipped import-encoder`: weights of other code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bad_input.row import Arguments, Row, extra, misshaped, without
from bad_input_support import Place

from support.original_vit import OriginalVit


def original(change: Callable[[dict[str, Any]], Any] = lambda tensors: None, *more: str) -> Arguments:
    """An import of a tiny encoder's weights under original names, changed."""

    def arguments(place: Place) -> list[Any]:
        tensors: dict[str, Any] = OriginalVit().tensors()
        change(tensors)
        torch.save(tensors, place.folder / "weights.pth")
        return ["import-encoder", "weights.pth", "--attention-heads", "3", *more, "--output", "out"]

    return arguments


def import_file(content: bytes) -> Arguments:
    return lambda p: ["import-encoder", p.write("weights.pth", content), "--output", "out"]


class Command:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("harmed",)


ROWS: dict[str, Row] = {
    "import, file missing": Row(
        lambda p: ["import-encoder", "no.pth", "--output", "out"], 1, ("no.pth: no such file",)
    ),
    "import, a folder": Row(
        lambda p: ["import-encoder", p.data(), "--output", "out"], 1, ("data: is a folder", "needs no import")
    ),
    "import, no weights": Row(
        import_file(b"hello, this is text"), 1, ("weights.pth: cannot be read as weights", ".pth")
    ),
    "import, an empty file": Row(import_file(b""), 1, ("weights.pth: cannot be read as weights", "copy it again")),
    "import, code in the file": Row(
        original(lambda tensors: tensors.update(more=Command())),
        1,
        ("asks to run", "print", "refused", "tensors alone"),
    ),
    "import, tensor missing": Row(original(without("norm.bias")), 1, ("weights.pth", "missing 1: norm.bias", "whole")),
    "import, tensor extra": Row(original(extra), 1, ("unexpected 1: surplus.weight", "--leave-out NAME")),
    "import, tensor misshaped": Row(original(misshaped("norm.bias")), 1, ("misshaped 1", "(3, 5)", "(24,)")),
    "import, of something else": Row(
        original(lambda tensors: tensors.pop("pos_embed")), 1, ("no vision transformer", "pos_embed", "blocks.0")
    ),
    "import, wrong number of heads": Row(
        original(lambda tensors: None, "--attention-heads", "7"), 2, ("--attention-heads 7", "width 24")
    ),
    "import, no number of heads": Row(
        lambda p: [*original()(p)[:2], "--output", "out"], 2, ("width 24", "give --attention-heads")
    ),
    "import, no heads at all": Row(
        original(lambda t: None, "--attention-heads", "0"), 2, ("attention_heads", "found 0")
    ),
    "import, no such side": Row(original(lambda t: None, "--weights", "student"), 1, ("no student", "--weights out")),
    "import, unknown side": Row(
        original(lambda t: None, "--weights", "tacher"), 2, ("weights", "'teacher' or 'student'")
    ),
    "import, no decoder": Row(original(lambda t: None, "--decoder"), 2, ("no decoder", "leave --decoder out")),
    "import, heads of a decoder left out": Row(
        original(lambda t: None, "--decoder-heads", "2"), 2, ("decoder_heads", "only with decoder")
    ),
    "import, mean alone": Row(original(lambda t: None, "--mean", "0.5"), 2, ("mean and std", "both or neither")),
    "import, mean of a wrong type": Row(
        original(lambda t: None, "--mean", "0.5,x", "--std", "0.5,1"), 2, ("'mean.1'", "(found 'x')")
    ),
    "import, means of too few channels": Row(
        original(lambda t: None, "--mean", "0.4,0.5", "--std", "0.5,1"), 2, ("weights.pth", "mean needs 3 numbers")
    ),
    "import, unknown objective": Row(
        original(lambda t: None, "--objective", "dino"), 2, ("objective", "self_supervised")
    ),
    "import, a classifier": Row(
        original(lambda t: t.update({"head.weight": torch.zeros(2, 24)})), 2, ("classifier", "--objective supervised")
    ),
    "import, heads elsewhere missing": Row(
        original(lambda t: None, "--dino-heads", "no.pth"), 1, ("no.pth: no such file",)
    ),
    "import, no heads elsewhere": Row(
        original(lambda t: None, "--dino-heads", "weights.pth"), 1, ("weights.pth: holds no DINO heads", "leave it out")
    ),
}
