"""`unclipped chat`: ask a model about images."""

from __future__ import annotations

import typer

HELP = """Ask a model about one or more images; the answer streams.

With -q one question is answered; without it an interactive conversation starts.

Examples:

  unclipped chat quickstart/model quickstart/examples/1.png -q "number?"

  unclipped chat model page-1.png page-2.png

  unclipped chat model page.png -q "total?" --sparse "global_text + sink(128) + topk(16)"
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("chat", help=HELP)(chat)


def chat(
    context: typer.Context,
    model: str = typer.Argument(..., help="Model folder."),
    images: list[str] = typer.Argument(None, help="Image files, in order."),
    question: str = typer.Option(None, "--question", "-q", help="Ask once and exit."),
    max_new_tokens: int = typer.Option(256, min=1, max=1_000_000, help="Longest answer in tokens."),
    device: str = typer.Option("auto", help="auto, cpu, cuda or mps."),
    sparse: str = typer.Option(None, help="Prefill under this pattern, e.g. 'global_text + sink(128) + topk(16)'."),
    sparse_fallback: str = typer.Option("auto", help="auto: dense where sparse does not pay; never: always sparse."),
) -> None:
    """Ask a model (see HELP)."""
    from unclipped.attention.config import SparseConfig
    from unclipped.cli.modes import refuse_unused
    from unclipped.inference.chat import chat as run
    from unclipped.recipes.validation import validate

    chosen = None
    if sparse is None:
        refuse_unused(context, "without --sparse", ("sparse_fallback",))
    else:
        chosen = validate({"pattern": sparse, "fallback": sparse_fallback}, SparseConfig, "chat")
    run(model, list(images or []), question, max_new_tokens=max_new_tokens, device=device, sparse=chosen)
