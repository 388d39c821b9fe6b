"""The difficulty dials of every generator, one frozen model each. No torch here: recipes are checked with these.

Ranges are `[low, high]`, both ends included; one number `n` stands for `[n, n]`. `tasks` gives categories and weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from unclipped.core.config import Decay, FrozenConfig, Name, Number, Share, Whole, complaint
from unclipped.core.errors import UsageError, nearest

FontName = Literal[
    "sans", "sans-bold", "sans-oblique", "mono", "mono-bold", "mono-oblique", "serif", "serif-bold", "serif-italic"
]
ColourName = Literal["red", "green", "blue", "orange", "purple", "black", "brown", "pink", "teal"]
SIX_COLOURS: tuple[ColourName, ...] = ("red", "green", "blue", "orange", "purple", "black")

# Counts stop at nine: a count of two digits could be a held-out number.
MOST_ITEMS = 9


def _as_range(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


Limit = Annotated[Whole, Field(ge=0, le=4096)]
Range = Annotated[tuple[Limit, Limit], BeforeValidator(_as_range)]


Weight = Annotated[Number, Field(ge=0, le=1_000_000)]
Side = Annotated[Whole, Field(ge=16, le=4096)]
Size = tuple[Side, Side]


def equal_weights(tasks: Any) -> dict[Any, float]:
    """Weight 1 for each category of a Literal."""
    return dict.fromkeys(get_args(tasks), 1.0)


class GeneratedOptions(FrozenConfig):
    """Dials that all generators of images share."""

    size: Size
    """Height and width of the image, px."""
    phrasing: Literal["short", "full"] = "short"
    """`short`: compact questions such as "number?"; `full`: English sentences, several paraphrases of each."""
    as_text: bool = False
    """No image: a transcript of the same scene stands before the same question."""
    fonts: tuple[FontName, ...] = Field(default=("sans",), min_length=1, max_length=9)
    """DejaVu faces to draw from, one a scene."""
    font_size: Range = (13, 18)
    """Font size, px. Text that would not fit is set smaller, down to 7 px."""
    colours: tuple[ColourName, ...] = Field(default=SIX_COLOURS, min_length=2, max_length=9)
    """Ink colours."""
    background: Range = (200, 255)
    """Grey levels (0…255) of the plain background; each channel is drawn on its own, light tints come out."""
    noise: Annotated[Number, Field(ge=0, le=64)] = 0.0
    """Standard deviation of Gaussian pixel noise, grey levels."""
    words: Literal["syllables", "english"] = "syllables"
    """`syllables`: consonants and vowels in turn, drawn anew; `english`: an embedded list of plain nouns."""
    word_length: Range = (3, 4)
    """Letters of a word, 3 to 12 (shorter ones could not be held out)."""
    digits: Range = (2, 2)
    """Digits of a number, 1 to 9. Single digits are never held out."""
    held_out_numbers: Share = 0.5
    """Share of held-out values among the numbers of val and test; the others are values that training shows too."""

    @field_validator(
        "word_length",
        "digits",
        "font_size",
        "background",
        "lines",
        "items",
        "count",
        "rows",
        "columns",
        "bars",
        check_fields=False,
    )
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError(f"expected [low, high], found {list(value)}; swap the two")
        return value

    @field_validator("colours", "fonts")
    @classmethod
    def _different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"the same name twice in {list(value)}; name each once")
        return value

    @field_validator("tasks", check_fields=False)
    @classmethod
    def _weights(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        if any(weight < 0 for weight in value.values()) or sum(value.values()) <= 0:
            raise ValueError(f"expected weights of 0 or more, one of them positive, found {dict(value)}")
        return value

    @model_validator(mode="after")
    def _limits(self) -> GeneratedOptions:
        limits = {"word_length": (3, 12), "digits": (1, 9), "font_size": (7, 400), "background": (120, 255)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value[0] < low or value[1] > high:
                raise ValueError(f"{name}: expected values from {low} to {high}, found {list(value)}")
        return self

    def _within(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value[0] < low or value[1] > high:
            raise ValueError(f"{name}: expected values from {low} to {high}, found {list(value)}")


CharactersTask = Literal["read_number", "read_text", "read_kth", "count", "colour", "compare", "locate"]


class CharactersOptions(GeneratedOptions):
    """Words and numbers on a plain background, in one or more lines.

    With one line of one item, `read_kth` asks for a letter or digit and `count` for their number; with more, both speak
    of the items.
    """

    size: Size = (24, 64)
    tasks: dict[CharactersTask, Weight] = equal_weights(CharactersTask)
    """Weight of each category of question."""
    lines: Range = (1, 1)
    """Lines of text in an image."""
    items: Range = (1, 1)
    """Words or numbers on a line. At most nine items in an image."""

    @model_validator(mode="after")
    def _room(self) -> CharactersOptions:
        self._within("lines", 1, MOST_ITEMS)
        self._within("items", 1, MOST_ITEMS)
        if self.lines[1] * self.items[1] > MOST_ITEMS:
            raise ValueError(
                f"lines × items: at most {MOST_ITEMS} items in an image, found up to {self.lines[1]} × {self.items[1]}"
            )
        return self


ShapesTask = Literal["count", "colour", "compare", "locate"]


class ShapesOptions(GeneratedOptions):
    """Circles, squares and triangles that do not touch. The dials of words, digits and fonts have no effect here."""

    size: Size = (64, 64)
    tasks: dict[ShapesTask, Weight] = equal_weights(ShapesTask)
    """Weight of each category of question."""
    count: Range = (1, 6)
    """Shapes in an image, at most nine."""
    shape_size: Range = (8, 20)
    """Width and height of a shape, px. Shapes that find no room are drawn smaller."""

    @model_validator(mode="after")
    def _room(self) -> ShapesOptions:
        self._within("count", 1, MOST_ITEMS)
        self._within("shape_size", 5, min(self.size) // 2)
        if self.tasks.get("compare", 0) > 0 and self.shape_size[1] < 1.6 * self.shape_size[0] + 1:
            raise ValueError(
                f"shape_size: to compare, the largest must be 1.6 times the smallest, found {list(self.shape_size)}"
            )
        if self.tasks.get("compare", 0) > 0 and self.count[1] < 2:
            raise ValueError(f"count: to compare, two shapes are needed, found at most {self.count[1]}")
        return self


class DocumentOptions(GeneratedOptions):
    """Defaults of the generators that look like documents: plain nouns, small type."""

    words: Literal["syllables", "english"] = "english"
    word_length: Range = (3, 6)
    font_size: Range = (9, 12)


ReceiptsTask = Literal["read_number", "read_text", "read_kth", "count", "compare"]


class ReceiptsOptions(DocumentOptions):
    """A shop's name, a date, lines of goods with prices, and their total."""

    size: Size = (112, 112)
    tasks: dict[ReceiptsTask, Weight] = equal_weights(ReceiptsTask)
    """Weight of each category of question."""
    fonts: tuple[FontName, ...] = Field(default=("mono", "sans"), min_length=1, max_length=9)
    items: Range = (2, 5)
    """Lines of goods."""
    digits: Range = (1, 2)
    """Digits of a price before the point; two digits stand behind it."""

    @model_validator(mode="after")
    def _room(self) -> ReceiptsOptions:
        self._within("items", 2, MOST_ITEMS)
        self._within("digits", 1, 4)
        return self


TablesTask = Literal["read_number", "read_text", "read_kth", "count", "compare", "locate"]


class TablesOptions(DocumentOptions):
    """Rows and columns with titles; a column holds numbers or words, and each table has a column of either kind."""

    size: Size = (96, 160)
    tasks: dict[TablesTask, Weight] = equal_weights(TablesTask)
    """Weight of each category of question."""
    rows: Range = (2, 5)
    """Rows below the titles."""
    columns: Range = (2, 3)
    """Columns beside the row titles."""

    @model_validator(mode="after")
    def _room(self) -> TablesOptions:
        self._within("rows", 2, MOST_ITEMS)
        self._within("columns", 2, MOST_ITEMS)
        return self


ChartsTask = Literal["read_number", "count", "colour", "compare"]
ChartKind = Literal["bar", "line", "pie"]


class ChartsOptions(DocumentOptions):
    """Bar, line and pie charts of named values."""

    size: Size = (112, 176)
    word_length: Range = (3, 5)
    tasks: dict[ChartsTask, Weight] = equal_weights(ChartsTask)
    """Weight of each category of question."""
    font_size: Range = (9, 11)
    kinds: tuple[ChartKind, ...] = Field(default=("bar", "line", "pie"), min_length=1, max_length=3)
    """Kinds of chart, equally likely."""
    bars: Range = (3, 5)
    """Bars, points or slices in a chart."""
    value_labels: bool = True
    """Values stand beside their bars. Without them bars and lines are read against an axis, to about one pixel (score
    those with relaxed accuracy); slices always carry their value."""

    @model_validator(mode="after")
    def _room(self) -> ChartsOptions:
        self._within("bars", 2, 6)
        self._within("digits", 1, 4)
        if self.bars[1] > len(self.colours):
            raise ValueError(f"bars: {self.bars[1]} bars need as many colours, found {len(self.colours)}")
        return self


SceneName = Literal["shapes", "characters", "receipts", "tables", "charts"]


class CaptionsOptions(FrozenConfig):
    """Dense captions of scenes that other generators draw, with boxes and masks of the objects.

    Of the dials of a kind of scene, `phrasing` and `as_text` have no effect here.
    """

    scenes: dict[SceneName, Weight] = Field(default={"shapes": 1.0}, min_length=1)
    """Weight of each kind of scene."""
    size: Size | None = None
    """Height and width of every image, px. None: what each kind of scene has by itself."""
    phrasing: Literal["short", "full"] = "short"
    """The instruction before the caption: `short`: "describe:"; `full`: English sentences. Pairs leave it out."""
    as_text: bool = False
    """No image: a transcript of the same scene stands before the instruction."""
    shapes: ShapesOptions = ShapesOptions()
    """Dials of scenes of shapes; their `tasks` say how counts, sizes and places are drawn."""
    characters: CharactersOptions = CharactersOptions()
    """Dials of scenes of characters."""
    receipts: ReceiptsOptions = ReceiptsOptions()
    """Dials of receipts."""
    tables: TablesOptions = TablesOptions()
    """Dials of tables."""
    charts: ChartsOptions = ChartsOptions()
    """Dials of charts."""

    @model_validator(mode="after")
    def _fits(self) -> CaptionsOptions:
        if any(weight < 0 for weight in self.scenes.values()) or sum(self.scenes.values()) <= 0:
            raise ValueError(f"scenes: expected weights of 0 or more, one of them positive, found {dict(self.scenes)}")
        for scene, weight in self.scenes.items():
            if weight > 0:
                self.of_scene(scene)
        return self

    def of_scene(self, scene: str) -> GeneratedOptions:
        """The dials of one kind of scene, at this `size` unless they name their own."""
        own: GeneratedOptions = getattr(self, scene)
        if self.size is None or "size" in own.model_fields_set:
            return own
        return type(own).model_validate({**own.model_dump(exclude_unset=True), "size": self.size})


NeedleTask = Literal[
    "top left", "top middle", "top right", "middle left", "middle middle", "middle right", "bottom left",
    "bottom middle", "bottom right",
]  # fmt: skip
Cells = Annotated[Whole, Field(ge=1, le=256)]


class NeedleOptions(DocumentOptions):
    """A page tiled with words in which one cell holds a number; categories are the ninths of the page it stands in."""

    size: Size = (384, 384)
    tasks: dict[NeedleTask, Weight] = equal_weights(NeedleTask)
    """Weight of each ninth of the page: where the number stands. By default those that hold a cell."""
    cells: tuple[Cells, Cells] = (12, 6)
    """Rows and columns of cells. Of fewer than three, some thirds of the page are without any: crops of such a page."""

    @model_validator(mode="before")
    @classmethod
    def _ninths_with_cells(cls, data: Any) -> Any:
        cells = data.get("cells") if isinstance(data, Mapping) else None
        sides = list(cells) if isinstance(cells, (list, tuple)) else []
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides) or "tasks" in data:
            return data  # cells of another form are refused by their own field
        return {**data, "tasks": {name: 1.0 for name in get_args(NeedleTask) if _has_cells(name, sides)}}

    @model_validator(mode="after")
    def _no_empty_ninth(self) -> NeedleOptions:
        for name, weight in self.tasks.items():
            if weight and not _has_cells(name, self.cells):
                raise ValueError(f"tasks: '{name}' holds no cell of {self.cells[0]}×{self.cells[1]}; leave it out")
        return self


def cells_of_third(band: str, cells: int) -> range:
    """The rows (or columns) of a third of a page; none where there are too few."""
    third = {"top": 0, "left": 0, "middle": 1, "bottom": 2, "right": 2}[band]
    return range(third * cells // 3, (third + 1) * cells // 3)


def _has_cells(ninth: str, cells: Sequence[int]) -> bool:
    return all(cells_of_third(band, count) for band, count in zip(ninth.split(), cells, strict=True))


PositiveShare = Annotated[Share, Field(gt=0)]


class MajorityOptions(FrozenConfig):
    """Text only: class words and dots in a row; the answer is the most frequent word, and one alone is that.

    The class words are a closed set of labels, the same in every split; a stable hash of the whole row decides which
    split may hold it.
    """

    classes: tuple[Name, ...] = Field(
        ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"),
        min_length=2,
        max_length=1000,
    )
    """Class words."""
    length: Annotated[Whole, Field(ge=4, le=1024)] = 16
    """Places in the row."""
    winner: tuple[PositiveShare, PositiveShare] = (0.3, 0.9)
    """Range of the winner's share of the words."""
    dots: tuple[Decay, Decay] = (0.0, 0.6)
    """Range of the share of dots among the places."""
    prefix: Name = "photo:"
    """What stands before the row."""
    question: Name = ""
    """What stands behind the row, after a semicolon; nothing when empty."""

    @model_validator(mode="after")
    def _fits(self) -> MajorityOptions:
        if len(set(self.classes)) < len(self.classes) or "." in self.classes:
            raise ValueError(f"classes: expected different words other than a dot, found {list(self.classes)}")
        for name, (low, high) in {"winner": self.winner, "dots": self.dots}.items():
            if low > high:
                raise ValueError(f"{name}: expected [low, high], found {[low, high]}; swap the two")
        return self


OPTIONS: dict[str, type[FrozenConfig]] = {
    "characters": CharactersOptions,
    "shapes": ShapesOptions,
    "receipts": ReceiptsOptions,
    "tables": TablesOptions,
    "charts": ChartsOptions,
    "captions": CaptionsOptions,
    "majority": MajorityOptions,
    "needle": NeedleOptions,
}


def parse_options(name: str, options: Mapping[str, Any] | FrozenConfig) -> FrozenConfig:
    """The validated dials of generator `name`. Raises UsageError naming the option, what was found and what fits."""
    if name not in OPTIONS:
        raise UsageError(f"unknown generated task '{name}'; {nearest(name, OPTIONS)}")
    model = OPTIONS[name]
    if isinstance(options, model):
        return options
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        raise UsageError(f"generated:{name}: {_explain(model, error)}") from None


def _explain(model: type[FrozenConfig], error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(piece) for piece in first["loc"] if piece != "[key]")
    if first["type"] == "extra_forbidden":
        section: Any = model
        for piece in first["loc"][:-1]:
            section = section.model_fields[piece].annotation
        return f"unknown option '{place}'; {nearest(str(first['loc'][-1]), section.model_fields)}"
    if first["type"] == "literal_error":
        valid = [word.strip(" '") for word in first.get("ctx", {})["expected"].replace(" or ", ", ").split(",")]
        return f"options.{place}: unknown value {first['input']!r}; {nearest(str(first['input']), valid)}"
    return f"options.{place}: {complaint(first, model)}" if place else first["msg"].removeprefix("Value error, ")
