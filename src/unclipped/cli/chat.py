"""`unclipped chat`: ask a model about images."""

from __future__ import annotations

import typer

HELP = """Ask a model about one or more images; the answer streams.

With -q one question is answered; without it an interactive conversation starts.

Examples:

  unclipped chat quickstart/model quickstart/sample.png -q "number?"

  unclipped chat model page-1.png page-2.png
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("chat", help=HELP)(chat)


def chat(
    model: str = typer.Argument(..., help="Model folder."),
    images: list[str] = typer.Argument(None, help="Image files, in order."),
    question: str = typer.Option(None, "--question", "-q", help="Ask once and exit."),
    max_new_tokens: int = typer.Option(256, min=1, help="Longest answer in tokens."),
    device: str = typer.Option("auto", help="auto, cpu, cuda or mps."),
) -> None:
    """Ask a model (see HELP)."""
    from unclipped.inference.chat import chat as run

    run(model, list(images or []), question, max_new_tokens=max_new_tokens, device=device)
