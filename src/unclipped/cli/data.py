"""`unclipped data`: what a data set holds, and what a filter keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

GROUP_HELP = """Look at data before training on it.

Examples:

  unclipped data stats my-folder --output runs/my-folder-stats

  unclipped data stats my-photos --filter text_rich --share 0.1 --output runs/text-rich
"""

HELP = """Count what a source or the data of a recipe holds, and show what a filter keeps.

SOURCE is a folder or file as in data.sources, generated:NAME, or a recipe (a YAML file or a built-in name). Counted are
samples, sizes of images, lengths of texts, categories, images that are the same under two names, and what cannot be
read. A filter tells how many images it keeps, with a histogram of its scores. OUTPUT gets stats.json and contact
sheets: images.png, or kept.png and rejected.png with a filter.

Examples:

  unclipped data stats my-folder --output runs/my-folder-stats

  unclipped data stats my-photos --split val --filter text_rich --threshold 0.7 --output runs/text-rich

  unclipped data stats my-photos format=images --filter text_rich --share 0.013 --output runs/heavy

  unclipped data stats generated:captions options.size=[64,64] --limit 200 --output runs/captions

  unclipped data stats my-recipe.yaml data.filter=text_rich --limit 1000 --output runs/my-recipe-stats
"""

ENDLESS = 1000
"""Samples looked at of a source without end when no limit is set."""


def register(app: typer.Typer) -> None:
    """Enter the group and its commands."""
    group = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=GROUP_HELP)
    group.command("stats", help=HELP)(stats)
    group.callback()(lambda: None)  # with one command alone, typer would leave its name out
    app.add_typer(group, name="data")


def stats(
    context: typer.Context,
    source: str = typer.Argument(..., help="Folder, file, generated:NAME, or recipe."),
    overrides: list[str] = typer.Argument(None, help="Changes to the source's fields or the recipe, key.path=value."),
    output: Path = typer.Option(..., help="Folder for stats.json and contact sheets."),
    split: str = typer.Option(None, help="Split of SOURCE (train); not for recipes."),
    limit: int = typer.Option(None, min=1, help="Look at the first so many samples of each source only."),
    filter: str = typer.Option(None, help="Filter to show: text_rich."),
    threshold: float = typer.Option(None, min=0, max=1, help="Least score that the filter keeps (0.5)."),
    share: float = typer.Option(None, min=0, max=1, help="Share that the filter keeps, in place of a threshold."),
) -> None:
    """Count a data set (see HELP)."""
    from unclipped.cli.modes import refuse_unused
    from unclipped.cli.record import record_run, run_folder

    if filter is None:
        remedy = "it says what a filter keeps: add --filter text_rich"
        refuse_unused(context, "without --filter", ("threshold", "share"), remedy=remedy)
    if _is_recipe(source):
        remedy = "its sources name their splits: change data.sources.0.split=…"
        refuse_unused(context, "with a recipe", ("split",), remedy=remedy)
    shown = None if filter is None else {"kind": filter, "threshold": threshold, "share": share}
    config = _data_of(source, overrides or [], split, shown)
    with run_folder(output, can_resume=False):
        from unclipped.core.files import write_json

        record_run(config, output, resume=False)
        found = {}
        for number, one in enumerate(config.sources):
            prefix = "" if len(config.sources) == 1 else f"{number}-"
            found[f"{number}"] = _survey(one, config, output, prefix, limit)
        write_json(output / "stats.json", {"sources": list(found.values())})
        typer.echo(f"\nwritten: {output / 'stats.json'}")


def _is_recipe(source: str) -> bool:
    from unclipped.recipes.loading import builtin_names
    from unclipped.recipes.validation import is_recipe_file

    return is_recipe_file(source) or (source in builtin_names() and not Path(source).exists())


def _data_of(source: str, overrides: list[str], split: str | None, shown: dict[str, Any] | None) -> Any:
    """The `data` section that SOURCE and the options stand for."""
    from unclipped.core.errors import UsageError
    from unclipped.data.config import DataConfig
    from unclipped.recipes.loading import apply_overrides, read_recipe
    from unclipped.recipes.validation import validate

    if _is_recipe(source):
        recipe = apply_overrides(read_recipe(source), overrides)
        section = recipe.get("data")
        if not isinstance(section, dict):
            raise UsageError(f"recipe {source}: has no section data to look at; give a source")
        where = f"recipe {source}, data"
    else:
        one = apply_overrides({"source": source, **({} if split is None else {"split": split})}, overrides)
        section, where = {"sources": [one]}, f"source {source}"
    if shown is not None:
        sources = section.get("sources")
        if isinstance(sources, list):
            sources = [{**one, "filter": shown} if isinstance(one, dict) else one for one in sources]
        section = {**section, "sources": sources}
    return validate(section, DataConfig, where)


def _survey(one: Any, config: Any, output: Path, prefix: str, limit: int | None) -> dict[str, Any]:
    """Count one source, print it and write its contact sheets."""
    from rich.console import Console

    from unclipped.core.progress import counting
    from unclipped.data.sources import LimitedSource, open_source
    from unclipped.data.survey import Survey

    shown = one.filter or config.filter
    whole = open_source(one.model_copy(update={"filter": None}), seed=config.seed or 0)
    most = limit if limit is not None else ENDLESS if whole.length is None else whole.length
    source = whole if whole.length == most else LimitedSource(whole, most)
    count = source.length or 0
    survey = Survey()
    with counting(f"{whole.name}", count, 0, Console(highlight=False, soft_wrap=True)) as progress:
        for index in range(count):
            survey.add(lambda index=index: source[index])
            progress.advance(1)
    total = "endless" if whole.length is None else whole.length
    row = {"source": one.model_dump(mode="json", exclude_defaults=True), "total": total, "looked_at": count}
    row |= survey.to_dict()
    _print(row, whole.name)
    if shown is None:
        _write_sheet(source, list(range(count)), lambda _, sample: _label(sample), output / f"{prefix}images.png")
        return row
    from unclipped.data.survey import filter_report
    from unclipped.data.text_rich.filtering import scores_of

    scores = scores_of(source)
    row["filter"], kept, others = filter_report(scores, shown)
    _print_filter(row["filter"])
    for name, indices in (("kept", kept), ("rejected", others)):
        _write_sheet(
            source, indices, lambda i, sample: f"{scores[i]:.3f} {_label(sample)}", output / f"{prefix}{name}.png"
        )
    return row


def _label(sample: Any) -> str:
    text = " ".join(sample.answer.split()) or sample.category or ""
    return text if len(text) <= 60 else text[:59] + "…"


def _write_sheet(source: Any, indices: Any, texts: Any, path: Path) -> None:
    from unclipped.data.survey import sheet

    picture = sheet(source, indices, texts)
    if picture is not None:
        picture.save(path)
        typer.echo(f"written: {path}")


def _print(row: dict[str, Any], name: str) -> None:
    def told(values: dict[str, float] | None, unit: str) -> str:
        if values is None:
            return "none"
        return f"{values['min']:g} / {values['median']:g} / {values['max']:g} {unit} ({values['count']:,})"

    looked, total, images = row["looked_at"], row["total"], row["images"]
    of = "an endless source" if total == "endless" else f"{total:,}"
    first = f"{looked:,}" if looked == total else f"the first {looked:,} of {of}"
    typer.echo(f"\n{name}")
    typer.echo(f"  samples            {first}; {row['samples_without_image']:,} without an image")
    channels = ", ".join(f"{mode} {count:,}" for mode, count in images["channels"].items()) or "none"
    typer.echo(f"  images             {images['named']:,} named, {images['different']:,} different; {channels}")
    for title, key, unit in (("height", "height", "px"), ("width", "width", "px"), ("width / height", "aspect", "")):
        typer.echo(f"  {title:18} {told(images[key], unit)}")
    for title in ("question", "answer", "document"):
        if row[f"{title}_characters"] is not None:
            typer.echo(f"  {title:18} {told(row[f'{title}_characters'], 'characters')}")
    categories = row["categories"]
    if categories["different"]:
        listed = ", ".join(f"{name} {count:,}" for name, count in categories["most_common"].items())
        typer.echo(f"  categories         {categories['different']:,}: {listed}")
    typer.echo(f"  same pixels        {images['same_pixels_under_another_name']:,} images under another name")
    typer.echo(f"  unreadable         {row['unreadable']['count']:,}")
    for message in row["unreadable"]["named"]:
        typer.echo(f"    {message}")


def _print_filter(report: dict[str, Any]) -> None:
    least = "" if report["least_score_kept"] is None else f", scores from {report['least_score_kept']:.3f}"
    highest = "" if report["highest_score"] is None else f"; highest score {report['highest_score']:.3f}"
    scored = report["images_scored"]
    typer.echo(f"  text_rich keeps    {report['kept']:,} of {scored:,} ({report['share_kept']:.1%}){least}{highest}")
    if report["kept"] == 0:
        typer.echo("    training on this stops with an error: a filter that keeps nothing")
    largest = max(report["score_histogram"].values(), default=0)
    for bounds, count in report["score_histogram"].items():
        bar = "#" * round(40 * count / largest) if largest else ""
        typer.echo(f"    {bounds}  {count:7,}  {bar}")
