"""One training or test item: turns of ordered text and image parts, whatever file it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from unclipped.core.documents import check_text, shown
from unclipped.images.part import ImagePart

if TYPE_CHECKING:
    from unclipped.images.part import ImageSource

Role = Literal["system", "user", "assistant", "document"]


@dataclass(frozen=True)
class TextPart:
    """A stretch of text inside a turn."""

    text: str


Part = ImagePart | TextPart


@dataclass(frozen=True)
class Turn:
    """What one role says. The role `document` is plain text to be modelled whole; it stands alone in its sample."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All text of the turn, images left out."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """The images of the turn in order."""
        return tuple(part for part in self.parts if isinstance(part, ImagePart))


@dataclass(frozen=True)
class Sample:
    """Turns with what scoring needs: category, choices, accepted answers, and the cluster whose samples are related."""

    id: str
    turns: tuple[Turn, ...]
    category: str | None = None
    choices: tuple[str, ...] | None = None
    answers: tuple[str, ...] = ()
    cluster: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Every sample passes here, from whichever reader: text that no tokenizer or file can take is an error."""
        where = f"sample {shown(self.id)}"
        for text in (self.id, self.category or "", self.cluster or "", *self.answers, *(self.choices or ())):
            check_text(text, where)
        for turn in self.turns:
            check_text(turn.text, where)

    @classmethod
    def qa(
        cls,
        id: str,
        images: Iterable[ImagePart | ImageSource],
        question: str,
        answer: str | None,
        *,
        answers: Iterable[str] | None = None,
        category: str | None = None,
        choices: Iterable[str] | None = None,
        cluster: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Sample:
        """Images first, then the question, then the answer (None: a prompt without one). `answers` defaults to it."""
        parts = tuple(image if isinstance(image, ImagePart) else ImagePart(image) for image in images)
        turns = (Turn("user", (*parts, TextPart(question))),)
        if answer is not None:
            turns = (*turns, Turn("assistant", (TextPart(answer),)))
        accepted = tuple(answers) if answers is not None else (() if answer is None else (answer,))
        return cls(
            id=id,
            turns=turns,
            category=category,
            choices=None if choices is None else tuple(choices),
            answers=accepted,
            cluster=cluster,
            metadata=dict(metadata or {}),
        )

    @classmethod
    def document(cls, id: str, text: str) -> Sample:
        """Plain text without roles, modelled token by token and closed by the end-of-text token."""
        return cls(id=id, turns=(Turn("document", (TextPart(text),)),))

    @classmethod
    def picture(cls, id: str, image: ImagePart, *, category: str | None = None) -> Sample:
        """An image alone, without question or answer: what encoders learn from and no language model can."""
        return cls(id=id, turns=(Turn("user", (image,)),), category=category)

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """All images in reading order."""
        return tuple(part for turn in self.turns for part in turn.images)

    @property
    def question(self) -> str:
        """The text of the last user turn ('' when there is none)."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "user"), "")

    @property
    def answer(self) -> str:
        """The text of the last assistant turn ('' when there is none)."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "assistant"), "")

    def without_images(self) -> Sample:
        """The blind form: the same turns with every image, and so every placeholder, taken out."""
        turns = tuple(
            replace(turn, parts=tuple(part for part in turn.parts if isinstance(part, TextPart))) for turn in self.turns
        )
        return replace(self, turns=turns)

    def map_text(self, change: Callable[[str], str], roles: Iterable[str] = ("user", "assistant")) -> Sample:
        """`change(text) -> text` applied to the texts of `roles` and to answers and choices."""
        roles = tuple(roles)
        turns = tuple(
            replace(
                turn,
                parts=tuple(TextPart(change(part.text)) if isinstance(part, TextPart) else part for part in turn.parts),
            )
            if turn.role in roles
            else turn
            for turn in self.turns
        )
        choices = None if self.choices is None else tuple(change(choice) for choice in self.choices)
        return replace(self, turns=turns, choices=choices, answers=tuple(change(answer) for answer in self.answers))

    def with_images(self, images: Iterable[ImagePart]) -> Sample:
        """The same sample with its images replaced in order. Raises ValueError when the number differs."""
        given = tuple(images)
        if len(given) != len(self.images):
            raise ValueError(f"sample {self.id}: {len(given)} images for {len(self.images)} places")
        supply: Iterator[ImagePart] = iter(given)
        turns = []
        for turn in self.turns:
            parts: list[Part] = []
            for part in turn.parts:
                parts.append(part if isinstance(part, TextPart) else next(supply))
            turns.append(replace(turn, parts=tuple(parts)))
        return replace(self, turns=tuple(turns))


@dataclass(frozen=True)
class SampleGroup:
    """Independent samples about the same images, encoded in one row that holds the images once."""

    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("a sample group needs at least one sample")

    @property
    def id(self) -> str:
        """The members' ids joined, for messages."""
        return "+".join(sample.id for sample in self.samples)

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """The shared images (those of the first sample)."""
        return self.samples[0].images

    def without_images(self) -> SampleGroup:
        """Every member in its blind form."""
        return SampleGroup(tuple(sample.without_images() for sample in self.samples))
