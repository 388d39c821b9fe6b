"""A processor's chat template and tokenizer as a maker of token ids with labels, everything that recurs kept."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unclipped.core.errors import DataError, ImageError
from unclipped.data.sample import ImagePart, Sample
from unclipped.encoding.control_tokens import Piece, TextTokens
from unclipped.encoding.template import Chunk, ImageSlot, Structure, render_structure, structure_of, texts_of

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a position that is not supervised."""


class ChatEncoder:
    """A processor's (or tokenizer's) chat template and tokens, with everything that can be looked up again kept."""

    def __init__(self, processor: Any) -> None:
        self._processor = weakref.ref(processor)  # weak: encoders are kept in a table that must not keep processors
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_token: str | None = getattr(processor, "image_token", None)
        self.image_token_id: int | None = getattr(processor, "image_token_id", None)
        self.text = TextTokens(self.tokenizer, self.image_token_id)
        self._structures: dict[Structure, tuple[Chunk, ...]] = {}
        self._end_token: int | None = None
        self._end_known = False

    def images(self, parts: Sequence[ImagePart], name: str) -> tuple[Tensor | None, Tensor | None, list[int]]:
        """(pixel_values, image_grid_thw, tokens of each image). Raises ImageError naming sample and file."""
        if not parts:
            return None, None, []
        processor = self.processor
        if not hasattr(processor, "image_processor"):
            raise DataError(f"sample {name}: has images but a tokenizer without image processor was given")
        try:
            features = processor.image_processor(parts)
        except ImageError as error:
            raise ImageError(f"sample {name}: {error}") from None
        grid = features["image_grid_thw"]  # (num_images, 3)
        return features["pixel_values"], grid, [int(count) for count in processor.num_image_tokens(grid)]

    def tokens(self, sample: Sample, counts: list[int], *, prompt: bool = False) -> tuple[list[int], list[int]]:
        """(ids, labels) of a sample whose images take `counts` tokens; `prompt`: up to the last answer.

        Control tokens in the texts of turns are encoded as characters. Raises DataError naming the sample.
        """
        try:
            return self._tokens(sample, counts, prompt)
        except DataError as error:
            raise DataError(f"sample {sample.id}: {error}") from error.__cause__

    def _tokens(self, sample: Sample, counts: list[int], prompt: bool) -> tuple[list[int], list[int]]:
        if sample.turns and sample.turns[0].role == "document":
            return self._document(sample, prompt)
        if len(sample.images) != len(counts):
            raise DataError(f"{len(sample.images)} images but token counts for {len(counts)}")
        structure = structure_of(sample, open_answer=prompt)
        texts = texts_of(sample)
        if not prompt:
            _check_answers(sample)
        chunks = self.structure(structure)
        end = self.end_token
        last = len(structure) - 1
        ids: list[int] = []
        labels: list[int] = []
        pending: list[Piece] = []
        after_answer = False
        image = 0

        def flush() -> None:
            nonlocal after_answer
            piece = self.text.encode(tuple(pending)) if pending else ()
            pending.clear()
            through = 0
            if after_answer:
                if end is None:
                    ids.append(self.tokenizer.eos_token_id)
                    labels.append(self.tokenizer.eos_token_id)
                else:
                    through = self._through_end(piece)
                after_answer = False
            elif not piece:
                return
            ids.extend(piece)
            labels.extend(piece[:through])
            labels.extend([IGNORED] * (len(piece) - through))

        for chunk in chunks:
            if isinstance(chunk, str):
                pending.append((chunk, True))
            elif isinstance(chunk, ImageSlot):
                flush()
                assert self.image_token_id is not None
                ids.extend([self.image_token_id] * counts[image])
                labels.extend([IGNORED] * counts[image])
                image += 1
            elif not chunk.answer:
                pending.append((chunk.fill(texts), False))
            else:
                flush()
                if prompt and chunk.turn == last:
                    break
                answer = self.text.encode(((chunk.fill(texts), False),))
                ids.extend(answer)
                labels.extend(answer)
                after_answer = True
        else:
            if pending or after_answer:
                flush()
        return ids, labels

    def structure(self, structure: Structure) -> tuple[Chunk, ...]:
        """Literals and slots of a structure of turns, rendered once. Raises DataError about the template."""
        known = self._structures.get(structure)
        if known is None:
            for role, kinds in structure:
                if role == "assistant" and "i" in kinds:
                    raise DataError("an assistant turn holds an image; only questions may")
                if role == "document":
                    raise DataError("a document stands alone; it cannot be mixed with turns")
            known = render_structure(self.processor, structure, self.image_token)
            self._structures[structure] = known
        return known

    @property
    def end_token(self) -> int | None:
        """The special token that the template puts after an answer, or None when it puts none and eos is added."""
        if not self._end_known:
            chunks = self.structure((("user", "t"), ("assistant", "t")))
            tail = chunks[-1] if isinstance(chunks[-1], str) else ""
            ids = self.text.encode(((tail, True),))
            self._end_token = next((token for token in ids if token in self.text.special), None)
            if self._end_token is None and self.tokenizer.eos_token_id is None:
                raise DataError(
                    "neither the chat template nor the tokenizer ends an answer; set the tokenizer's eos token"
                )
            self._end_known = True
        return self._end_token

    def _through_end(self, piece: Sequence[int]) -> int:
        """Number of tokens of `piece` through the end of the answer that it follows."""
        for index, token in enumerate(piece):
            if token in self.text.special:
                if token == self._end_token:
                    return index + 1
                break
        end = self.tokenizer.convert_ids_to_tokens(self._end_token)
        raise DataError(f"the chat template does not end every answer by {end}; choose another template")

    def _document(self, sample: Sample, prompt: bool) -> tuple[list[int], list[int]]:
        if len(sample.turns) != 1 or sample.images:
            raise DataError("a document is a sample of its own, without other turns or images")
        ids = self.text.document(sample.turns[0].text)
        eos = self.tokenizer.eos_token_id
        if eos is not None and not prompt and (not ids or ids[-1] != eos):
            ids.append(eos)
        if len(ids) < 2 and not prompt:
            raise DataError("no supervised token: the document is empty; remove it")
        return ids, list(ids)

    @property
    def processor(self) -> Any:
        """The processor or tokenizer that this encoder serves."""
        processor = self._processor()
        if processor is None:
            raise ReferenceError("the processor of this encoder is gone")
        return processor


def _check_answers(sample: Sample) -> None:
    """Raise DataError for a sample to train on that has no answer, or an empty one in any turn."""
    answers = {number: turn.text.strip() for number, turn in enumerate(sample.turns) if turn.role == "assistant"}
    if all(answers.values()) and answers:
        return
    if any(answers.values()):
        empty = next(number for number, answer in answers.items() if not answer)
        raise DataError(f"no supervised token in turn {empty}: its answer is empty; add the text or remove the turn")
    if sample.images and not any(turn.text.strip() for turn in sample.turns):
        raise DataError(
            "an image alone, without question and answer or a caption: an encoder can be pretrained on it, a "
            "vision-language model cannot be trained; add the text or take another source"
        )
    raise DataError("no supervised token: it has no answer, or an empty one; add or remove it")


_ENCODERS: weakref.WeakKeyDictionary[Any, tuple[object, ChatEncoder]] = weakref.WeakKeyDictionary()


def encoder_of(processor: Any) -> ChatEncoder:
    """The encoder of a processor, made once and again when its chat template or vocabulary changes."""
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    state = (str(template), len(tokenizer))
    known = _ENCODERS.get(processor)
    if known is None or known[0] != state:
        known = (state, ChatEncoder(processor))
        _ENCODERS[processor] = known
    return known[1]
