"""Mistakes of `unclipped prefill quality | bench | search`."""

from __future__ import annotations

from bad_input.row import Arguments, Row


def prefill(command: str, *more: str) -> Arguments:
    data = [] if command == "bench" else ["--data"]
    return lambda place: [
        "prefill", command, place.models.vlm, *data, *([place.data()] if data else []), *more, "--output", "out"
    ]  # fmt: skip


def prefill_with_file(content: str) -> Arguments:
    """`prefill quality` under a pattern file of this content."""
    return lambda place: prefill("quality", "--pattern", place.write("own.yaml", content))(place)


ROWS: dict[str, Row] = {
    **{
        f"prefill {command} without scores, {option}": Row(
            prefill(command, *how, option, value), 2, (f"{option}: not used with", "leave it out")
        )
        for command, how in (("quality", ("--pattern", "topk(2)", "--no-score")), ("search", ()))
        for option, value in (("--scorer", "anls"), ("--max-new-tokens", "2"), ("--batch-size", "2"))
    },
    "prefill quality, unknown pattern": Row(
        prefill("quality", "--pattern", "topkk(2)"), 2, ("topkk", "did you mean 'topk'")
    ),
    "prefill quality, twice the same": Row(
        prefill("quality", "--pattern", "topk(2)", "--pattern", "topk(2)"), 2, ("'topk(2)' stands there twice",)
    ),
    "prefill quality, too many layers": Row(
        prefill("quality", "--pattern", "per_layer(full | full | full)"), 2, ("per_layer", "3 patterns", "2 layers")
    ),
    "prefill quality, no pattern file": Row(
        prefill("quality", "--pattern", "gone.yaml"), 1, ("pattern file gone.yaml", "No such file", "prefill search")
    ),
    "prefill quality, wrong pattern file": Row(
        prefill_with_file("patern: topk(2)"), 1, ("own.yaml", "field 'pattern'", "fields are pattern, key_block")
    ),
    "prefill quality, blocks": Row(
        prefill("quality", "--pattern", "topk(2)", "--key-block", "24"), 2, ("query_block (256)", "key_block (24)")
    ),
    "prefill quality, endless without limit": Row(
        lambda p: [
            "prefill",
            "quality",
            p.models.vlm,
            "--data",
            "generated:needle",
            "--pattern",
            "topk(2)",
            "--output",
            "out",
        ],
        2,
        ("endless", "limit"),
    ),
    "prefill quality, a decoder": Row(
        lambda p: ["prefill", "quality", p.models.text, "--data", p.data(), "--pattern", "topk(2)", "--output", "out"],
        1,
        ("holds a 'qwen3'", "assemble"),
    ),
    "prefill search, unknown bound": Row(
        prefill("search", "--bound", "kll=0.1"), 2, ("--bound kll=0.1", "did you mean 'kl'")
    ),
    "prefill search, bound without number": Row(prefill("search", "--bound", "kl"), 2, ("--bound kl", "kl=0.05")),
    "prefill search, bound of zero": Row(prefill("search", "--bound", "kl=0"), 2, ("field 'kl'", "greater than 0")),
    "prefill search, one prompt": Row(prefill("search", "--limit", "1"), 2, ("at least 2 prompts",)),
    "prefill search, a list as candidate": Row(
        prefill("search", "--candidate", "per_layer(full | topk(2))"), 2, ("per_layer", "makes the lists itself")
    ),
    "prefill bench, tokens": Row(
        prefill("bench", "--pattern", "topk(2)", "--tokens", "1k"), 2, ("--tokens", "'1k'", "whole numbers")
    ),
    "prefill bench, too few tokens": Row(
        prefill("bench", "--pattern", "topk(2)", "--tokens", "4"), 2, ("field 'tokens'", "at least 16")
    ),
    "prefill bench, beyond the positions": Row(
        prefill("bench", "--pattern", "topk(2)", "--tokens", "4096"), 2, ("4096 tokens", "512 positions")
    ),
    "prefill bench, layers of a saved model": Row(
        prefill("bench", "--pattern", "topk(2)", "--layers", "1"), 2, ("layers", "only shapes", "0.6b")
    ),
    "prefill bench, unknown model": Row(
        lambda p: ["prefill", "bench", "0.6c", "--pattern", "topk(2)", "--output", "out"],
        2,
        ("0.6c", "neither a model folder nor a shape", "0.6b"),
    ),
}
