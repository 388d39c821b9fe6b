"""One self-contained HTML page about an experiment: no script, no external resource, readable on any screen."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclipped.core.files import write_text
from unclipped.studies.plots import bar_plot, line_plot, loss_plot
from unclipped.studies.reading import headline_figures, label_of, read_figures
from unclipped.studies.report_data import (
    PERCENT_METRICS,
    GalleryItem,
    ReportData,
    clock,
    formatted,
    formatted_difference,
    formatted_interval,
    metric_of,
)

if TYPE_CHECKING:
    from jinja2 import Environment

_LONGEST_SIDE = 480  # px of a gallery image inside the page
_SMALL_PIXELS = 128 * 256  # up to here an image is kept exact and shown enlarged with hard pixels


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write the page to `path` (its folder is made when missing) and return the path.

    Raises UnclippedError when the file cannot be written, ImageError when a gallery image cannot be read.
    """
    path = Path(path)
    write_text(path, render_report(data))
    return path


def render_report(data: ReportData) -> str:
    """The page as HTML text."""
    pages = page_environment()
    pages.filters["figure"] = lambda row: formatted(metric_of(row), row[metric_of(row)])
    pages.filters["interval"] = formatted_interval
    pages.filters["difference"] = formatted_difference
    labels = {arm: label_of(data, arm) for arm in (*data.arms, *data.curves)}
    has_perplexity = any(stage.perplexity_after is not None for stage in data.stages)
    return pages.get_template("report.html.j2").render(
        data=data,
        reading=data.reading or read_figures(data),
        headline=data.headline or headline_figures(data),
        labels=labels,
        metrics=_plots(data, labels),
        losses=_loss(data, labels),
        plots=[
            {"plot": plot, "wide": line_plot(plot, narrow=False), "narrow": line_plot(plot, narrow=True)}
            for plot in data.plots
        ],
        pictures=[(picture, _png_uri(picture.path)) for picture in data.pictures],
        group_labels={group: label_of(data, group) for group in data.groups},
        gallery=[(item, image_uri(item)) for item in data.gallery],
        num_right=sum(item.is_right for item in data.gallery),
        has_perplexity=has_perplexity,
        environment=environment_rows(data.environment),
    )


def page_environment() -> Environment:
    """What fills the templates of pages; it escapes, and refuses names that are not given."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("unclipped.studies", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["clock"] = clock
    return pages


def write_sections(
    path: Path, title: str, lead: str, sections: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]
) -> Path:
    """Write a page of plots and tables and return its path; the run's recipe.yaml beside it stands at its end.

    sections: each {title, text, figures: [{wide, narrow}], head, rows of cells}. Raises UnclippedError when it cannot
    be written.
    """
    recipe = path.parent / "recipe.yaml"
    text = page_environment().get_template("sections.html.j2").render(
        title=title, lead=lead, sections=sections, environment=environment_rows(environment),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )  # fmt: skip
    write_text(path, text)
    return path


def _plots(data: ReportData, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """For each metric: its bar plots and the categories of its table."""
    metrics: dict[str, list[str]] = {}
    for rows in data.arms.values():
        for category, row in rows.items():
            names = metrics.setdefault(metric_of(row), [])
            if category not in names:
                names.append(category)
    drawn = []
    for metric, categories in metrics.items():
        arms = {
            arm: {name: rows[name] for name in categories if name in rows and metric_of(rows[name]) == metric}
            for arm, rows in data.arms.items()
        }
        arms = {arm: rows for arm, rows in arms.items() if rows}
        options = {"as_percent": metric in PERCENT_METRICS}
        drawn.append(
            {
                "name": metric,
                "categories": categories,
                "arms": arms,
                "wide": bar_plot(arms, metric, labels, narrow=False, **options),
                "narrow": bar_plot(arms, metric, labels, narrow=True, **options),
            }
        )
    return drawn


def _loss(data: ReportData, labels: Mapping[str, str]) -> dict[str, str] | None:
    curves = {arm: rows for arm, rows in data.curves.items() if any("loss" in row for row in rows)}
    if not curves:
        return None
    return {size: loss_plot(curves, labels, narrow=size == "narrow") for size in ("wide", "narrow")}


def _png_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def image_uri(item: GalleryItem) -> dict[str, Any] | None:
    """The image of an item as a data URI with its size; large ones are shrunk, small ones stay exact.

    Raises ImageError when the file cannot be read.
    """
    if item.image is None:
        return None
    from unclipped.images.part import ImagePart
    from unclipped.images.prepare import decoded

    image = decoded(ImagePart(item.image))
    is_small = image.width * image.height <= _SMALL_PIXELS
    if not is_small:
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = io.BytesIO()
    # PNG keeps drawings exact and small; photographs above the small size are far smaller as JPEG.
    kind = "png" if is_small or image.getcolors(256) is not None else "jpeg"
    image.save(buffer, format=kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {
        "uri": f"data:image/{kind};base64,{encoded}",
        "width": image.width,
        "height": image.height,
        "is_small": is_small,
    }


def environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The environment as (name, value) rows, nested values joined."""
    rows = []
    for name, value in environment.items():
        if value is None or value == []:
            continue
        if isinstance(value, Mapping):
            parts = [f"{key} {_shown(part)}" for key, part in value.items() if part not in (None, [])]
            rows.append((name, " · ".join(parts)))
        else:
            rows.append((name, _shown(value)))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
