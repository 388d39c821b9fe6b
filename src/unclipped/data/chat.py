"""A processor's chat template and tokenizer as a maker of token ids with labels, everything that recurs kept."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from unclipped.core.errors import DataError, ImageError
from unclipped.data.sample import ImagePart, Sample
from unclipped.data.template import Chunk, ImageSlot, Structure, render_structure, structure_of, texts_of

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a position that is not supervised."""

_KEPT_PIECES = 1 << 14


class ChatEncoder:
    """A processor's (or tokenizer's) chat template and tokens, with everything that can be looked up again kept."""

    def __init__(self, processor: Any) -> None:
        self._processor = weakref.ref(processor)  # weak: encoders are kept in a table that must not keep processors
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_token: str | None = getattr(processor, "image_token", None)
        self.image_token_id: int | None = getattr(processor, "image_token_id", None)
        special = set(self.tokenizer.all_special_ids)
        special.update(index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        self.special = frozenset(special)
        self.tokenise = lru_cache(maxsize=_KEPT_PIECES)(self._tokenise)
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
        """(ids, labels) of a sample whose images take `counts` tokens; `prompt`: up to the last answer."""
        if sample.turns and sample.turns[0].role == "document":
            return self._document(sample, prompt)
        if len(sample.images) != len(counts):
            raise DataError(f"sample {sample.id}: {len(sample.images)} images but token counts for {len(counts)}")
        structure = structure_of(sample, open_answer=prompt)
        texts = texts_of(sample)
        if not prompt and not any(
            any(text.strip() for text in turn)
            for (role, _), turn in zip(structure, texts, strict=True)
            if role == "assistant"
        ):
            if not any(text.strip() for turn in texts for text in turn) and sample.images:
                raise DataError(
                    f"sample {sample.id}: an image alone, without question and answer or a caption: an encoder can be "
                    "pretrained on it, a vision-language model cannot be trained; add the text or take another source"
                )
            raise DataError(
                f"sample {sample.id}: no supervised token: it has no answer, or an empty one; add or remove it"
            )
        try:
            chunks = self.structure(structure)
        except DataError as error:
            raise DataError(f"sample {sample.id}: {error}") from None
        end = self.end_token
        last = len(structure) - 1
        ids: list[int] = []
        labels: list[int] = []
        pending: list[str] = []
        after_answer = False
        image = 0

        def flush() -> None:
            nonlocal after_answer
            piece = self.tokenise("".join(pending)) if pending else ()
            pending.clear()
            through = 0
            if after_answer:
                if end is None:
                    ids.append(self.tokenizer.eos_token_id)
                    labels.append(self.tokenizer.eos_token_id)
                else:
                    through = self._through_end(piece, sample.id)
                after_answer = False
            elif not piece:
                return
            ids.extend(piece)
            labels.extend(piece[:through])
            labels.extend([IGNORED] * (len(piece) - through))

        for chunk in chunks:
            if isinstance(chunk, str):
                pending.append(chunk)
            elif isinstance(chunk, ImageSlot):
                flush()
                assert self.image_token_id is not None
                ids.extend([self.image_token_id] * counts[image])
                labels.extend([IGNORED] * counts[image])
                image += 1
            elif not chunk.answer:
                pending.append(chunk.fill(texts))
            else:
                flush()
                if prompt and chunk.turn == last:
                    break
                answer = self.tokenise(chunk.fill(texts))
                ids.extend(answer)
                labels.extend(answer)
                after_answer = True
        else:
            if pending or after_answer:
                flush()
        if self.image_token_id is not None and ids.count(self.image_token_id) != sum(counts):
            raise DataError(
                f"sample {sample.id}: its text itself holds the image token {self.image_token!r}; remove it there"
            )
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
            self._end_token = next((token for token in self.tokenise(tail) if token in self.special), None)
            if self._end_token is None and self.tokenizer.eos_token_id is None:
                raise DataError(
                    "neither the chat template nor the tokenizer ends an answer; set the tokenizer's eos token"
                )
            self._end_known = True
        return self._end_token

    def _through_end(self, piece: Sequence[int], name: str) -> int:
        """Number of tokens of `piece` through the end of the answer that it follows."""
        for index, token in enumerate(piece):
            if token in self.special:
                if token == self._end_token:
                    return index + 1
                break
        end = self.tokenizer.convert_ids_to_tokens(self._end_token)
        raise DataError(f"sample {name}: the chat template does not end every answer by {end}; choose another template")

    def _document(self, sample: Sample, prompt: bool) -> tuple[list[int], list[int]]:
        if len(sample.turns) != 1 or sample.images:
            raise DataError(f"sample {sample.id}: a document stands alone, without other turns or images")
        ids = list(self.tokenizer(sample.turns[0].text)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if eos is not None and not prompt and (not ids or ids[-1] != eos):
            ids.append(eos)
        if len(ids) < 2 and not prompt:
            raise DataError(f"sample {sample.id}: no supervised token: the document is empty; remove it")
        return ids, list(ids)

    def _tokenise(self, text: str) -> tuple[int, ...]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # The fast path skips the wrapper; padding or truncation left on by an earlier call would show in it.
        if backend is not None and backend.padding is None and backend.truncation is None:
            return tuple(backend.encode(text, add_special_tokens=False).ids)
        return tuple(self.tokenizer(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"])

    @property
    def processor(self) -> Any:
        """The processor or tokenizer that this encoder serves."""
        processor = self._processor()
        if processor is None:
            raise ReferenceError("the processor of this encoder is gone")
        return processor


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
