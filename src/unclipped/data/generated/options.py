"""The difficulty dials of every generator, one frozen model each. No torch here: recipes are checked with these.

Ranges are `[low, high]`, both ends included; one number `n` stands for `[n, n]`. `tasks` gives categories and weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from unclipped.core.config import FrozenConfig
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


Range = Annotated[tuple[int, int], BeforeValidator(_as_range)]


Weight = Annotated[float, Field(ge=0)]
Side = Annotated[int, Field(ge=16, le=4096)]
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
    fonts: tuple[FontName, ...] = Field(("sans",), min_length=1)
    """DejaVu faces to draw from, one a scene."""
    font_size: Range = (13, 18)
    """Font size, px. Text that would not fit is set smaller, down to 7 px."""
    colours: tuple[ColourName, ...] = Field(SIX_COLOURS, min_length=2)
    """Ink colours."""
    background: Range = (200, 255)
    """Grey levels (0…255) of the plain background; each channel is drawn on its own, light tints come out."""
    noise: float = Field(0.0, ge=0.0, le=64.0)
    """Standard deviation of Gaussian pixel noise, grey levels."""
    words: Literal["syllables", "english"] = "syllables"
    """`syllables`: consonants and vowels in turn, drawn anew; `english`: an embedded list of plain nouns."""
    word_length: Range = (3, 4)
    """Letters of a word, 3 to 12 (shorter ones could not be held out)."""
    digits: Range = (2, 2)
    """Digits of a number, 1 to 9. Single digits are never held out."""
    held_out_numbers: float = Field(0.5, ge=0.0, le=1.0)
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


OPTIONS: dict[str, type[FrozenConfig]] = {"characters": CharactersOptions}


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
        return f"unknown option '{place}'; {nearest(place, model.model_fields)}"
    if first["type"] == "literal_error":
        valid = [word.strip(" '") for word in first.get("ctx", {})["expected"].replace(" or ", ", ").split(",")]
        return f"options.{place}: unknown value {first['input']!r}; {nearest(str(first['input']), valid)}"
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "value_error" else f", found {first['input']!r}"
    return f"options.{place}: {message}{found}" if place else message
