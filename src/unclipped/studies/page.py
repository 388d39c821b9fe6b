"""Self-contained HTML pages made of sections: no script, no external resource, readable on any screen."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclipped.core.files import write_text
from unclipped.evaluation.figures import Figure

if TYPE_CHECKING:
    from PIL import Image

_LONGEST_SIDE = 480  # px of a gallery image inside the page
_SMALL_PIXELS = 128 * 256  # up to here an image is kept exact and shown enlarged with hard pixels


@dataclass(frozen=True)
class Links:
    """A cell of links: a text before them, then (text, address) of each."""

    text: str
    links: Sequence[tuple[str, str]]


Cell = str | Figure | Links


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences; warnings are set off."""

    points: Sequence[str]
    is_warning: bool = False


@dataclass(frozen=True)
class Tiles:
    """(label, value, detail) of figures at the top of a page."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Plot:
    """A drawing for wide and one for narrow screens, as SVG."""

    wide: str
    narrow: str
    caption: str = ""
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file with the sentence under it."""

    path: Path
    caption: str

    @property
    def sheet(self) -> str:
        """The file as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode('ascii')}"


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first `text_columns` columns hold text, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1


@dataclass(frozen=True)
class GalleryItem:
    """A test image with its question, the gold answer and the model's. `image`: Pillow object, file or None."""

    image: Image.Image | Path | str | None
    question: str
    answer: str
    prediction: str
    is_right: bool
    category: str | None = None

    def shown_image(self) -> dict[str, Any] | None:
        """The image as a data URI with its size; large ones are shrunk, small ones stay exact.

        Raises ImageError when the file cannot be read.
        """
        if self.image is None:
            return None
        from unclipped.images.part import ImagePart
        from unclipped.images.prepare import decoded

        image = decoded(ImagePart(self.image))
        is_small = image.width * image.height <= _SMALL_PIXELS
        if not is_small:
            image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        buffer = io.BytesIO()
        # PNG keeps drawings exact and small; photographs above the small size are far smaller as JPEG.
        kind = "png" if is_small or image.getcolors(256) is not None else "jpeg"
        image.save(buffer, format=kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
        encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
        uri = f"data:image/{kind};base64,{encoded}"
        return {"uri": uri, "width": image.width, "height": image.height, "is_small": is_small}


@dataclass(frozen=True)
class Gallery:
    """Test images with their answers."""

    items: Sequence[GalleryItem]


@dataclass(frozen=True)
class Commands:
    """(what it does, command) of each."""

    commands: Sequence[tuple[str, str]]


Part = Text | Points | Tiles | Plot | Picture | Table | Gallery | Commands


@dataclass(frozen=True)
class Section:
    """A heading and its parts."""

    title: str
    parts: Sequence[Part]


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section], **more: Any) -> Path:
    """Write a page (see `render_page`) and return its path.

    Raises UnclippedError when the file cannot be written, ImageError when a gallery image cannot be read.
    """
    recipe = path.parent / "recipe.yaml"
    if "recipe" not in more and recipe.is_file():
        more["recipe"] = recipe.read_text(encoding="utf-8")
    write_text(path, render_page(title, lead, sections, **more))
    return path


def render_page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    *,
    intro: Sequence[Part] = (),
    facts: Sequence[tuple[str, str]] = (),
    environment: Mapping[str, Any] | None = None,
    recipe: str = "",
) -> str:
    """The page as HTML; all texts are escaped, plots are taken as the SVG that they are.

    intro: parts under the lead. facts: times and costs. environment: as `studies.environment.environment` gives it.
    recipe: YAML at the end.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("unclipped.studies", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [section for section in sections if section.parts]
    return pages.get_template("page.html.j2").render(
        title=title,
        lead=lead,
        intro=intro,
        sections=shown,
        facts=facts,
        environment=_environment_rows(environment or {}),
        recipe=recipe,
    )


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def clock(seconds: float) -> str:
    """Seconds as `45 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
