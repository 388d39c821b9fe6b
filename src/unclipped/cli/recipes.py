"""`unclipped recipes`: the built-in recipes, and one of them in full."""

from __future__ import annotations

import typer

HELP = """List the built-in recipes, or print one with everything it inherits.

Examples:

  unclipped recipes

  unclipped recipes nlvr > my-recipe.yaml
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("recipes", help=HELP)(recipes)


def recipes(name: str = typer.Argument(None, help="Recipe to print.")) -> None:
    """List or print built-in recipes (see HELP)."""
    import yaml

    from unclipped.recipes.loading import builtin_names, read_recipe

    if name is not None:
        typer.echo(yaml.safe_dump(read_recipe(name), sort_keys=False, allow_unicode=True, width=110), nl=False)
        return
    for builtin in builtin_names():
        recipe = read_recipe(builtin)
        typer.echo(f"{builtin:24} {recipe.get('kind', ''):18} {recipe.get('description', '')}")
