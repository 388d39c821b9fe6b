"""One engine for chat, serving and evaluation: a loaded model that answers requests in batches or as a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from unclipped.attention.config import SparseConfig
from unclipped.attention.prefill import SparsePrefill, prefill_with
from unclipped.core.errors import DataError, UsageError
from unclipped.data.sample import Sample
from unclipped.encoding.collate import collate_prompts
from unclipped.encoding.examples import Example, encode_prompt, position_limit
from unclipped.images.config import ImageRule
from unclipped.inference.greedy import greedy_steps, up_to_end
from unclipped.inference.messages import Messages, sample_from_messages

Request = Sample | Messages
"""A sample, whose last answer is left out when it has one, or a conversation that ends with the user."""

_PROBED_VALUES = 4096
_WINDOW = 16  # batches encoded together, so that rows of one batch can have like lengths


def find_device(name: str = "auto") -> torch.device:
    """The device to run on; `auto` takes CUDA, then MPS, then the CPU. Raises UsageError when it is not there."""
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device '{name}': expected auto, cpu, cuda, cuda:N or mps") from None
    is_there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not is_there.get(device.type, False):
        raise UsageError(f"device '{name}' is not available on this machine; choose auto or cpu")
    return device


class Engine:
    """A model with its processor on a device, answering greedily.

    Greedy is the arg max of the logits: of the checkpoint's generation settings only end tokens and suppressed tokens
    count. Answers do not depend on the batch they are computed in, up to rounding.
    """

    sparse: SparsePrefill | None = None
    """The hold on the model while it prefills under a pattern."""
    _sparse_config: SparseConfig | None = None

    def __init__(
        self, model: Any, processor: Any = None, *, device: str = "auto", sparse: SparseConfig | None = None
    ) -> None:
        """`model` is a folder or hub id, or a loaded model, which then needs its `processor`.

        sparse: prefill under this pattern, for as long as the model lives.
        """
        if isinstance(model, str | Path):
            from unclipped.models.checkpoint import load_model

            model, loaded = load_model(model)
            processor = loaded if processor is None else processor
        if processor is None:
            raise UsageError("Engine: a loaded model needs its processor; pass it, or give the model's folder")
        self.device = find_device(device)
        self.processor = processor
        self.model = model.to(self.device).eval()
        if sparse is not None:
            self.sparse, self._sparse_config = prefill_with(self.model, sparse), sparse
        settings = model.generation_config
        ends = {processor.tokenizer.eos_token_id, *_as_list(settings.eos_token_id)} - {None}
        if not ends:
            raise UsageError("Engine: neither the model nor its tokenizer names an end token; set eos_token")
        self.end_ids = {int(token) for token in ends}
        self.suppressed_ids = sorted({model.config.image_token_id, *_as_list(settings.suppress_tokens)} - {None})

    @property
    def image_rule(self) -> ImageRule:
        """What is done to an image before the model's encoder."""
        return self.processor.image_processor.image_rule

    def encode(self, request: Request, name: str = "request") -> Example:
        """A request as a prompt: ids up to where the answer begins, and its images' patches.

        Raises DataError when the prompt leaves no room for an answer in the model's positions.
        """
        prompt = self._encode(request, name)
        if reason := self._too_long(prompt):
            raise DataError(f"{prompt.id}: {reason}; shorten it or lower the image budget")
        return prompt

    def _encode(self, request: Request, name: str) -> Example:
        sample = request if isinstance(request, Sample) else sample_from_messages(request, name)
        return encode_prompt(sample, self.processor)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 32,
        on_progress: Callable[[int], None] | None = None,
        on_too_long: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Answers in the order of the requests, without surrounding white space.

        Requests are encoded a window of batches at a time and batched by like length. `on_progress` is called with the
        number of requests answered by each batch. on_too_long: called with the number of a request that leaves no room
        for an answer, and why; its answer is empty. Without it such a request raises DataError.
        """
        answers = [""] * len(requests)
        window = batch_size * _WINDOW
        for start in range(0, len(requests), window):
            numbers = range(start, min(start + window, len(requests)))
            encode = self.encode if on_too_long is None else self._encode
            prompts = {number: encode(requests[number], f"request {number}") for number in numbers}
            if on_too_long is not None:
                for number in numbers:
                    if reason := self._too_long(prompts[number]):
                        on_too_long(number, reason)
                        del prompts[number]
            if on_progress is not None and len(prompts) < len(numbers):
                on_progress(len(numbers) - len(prompts))
            by_length = sorted(prompts, key=lambda number: (len(prompts[number].input_ids), number))
            for first in range(0, len(by_length), batch_size):
                chosen = by_length[first : first + batch_size]
                for number, tokens in zip(
                    chosen, self._batch([prompts[number] for number in chosen], max_new_tokens), strict=True
                ):
                    answers[number] = self._text(tokens).strip()
                if on_progress is not None:
                    on_progress(len(chosen))
        return answers

    def stream(self, request: Request, *, max_new_tokens: int = 256) -> Iterator[str]:
        """The answer to one request piece by piece; the pieces joined are the answer.

        Generation goes on only while pieces are taken, and stops when the iterator is closed.
        """
        tokens: list[int] = []
        shown = ""
        for step in self._steps([self.encode(request)], max_new_tokens):
            token = int(step[0])
            if token in self.end_ids:
                break
            tokens.append(token)
            text = self._text(tokens)
            # A character can take several tokens; half of one decodes to the replacement character: wait for the rest.
            if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(shown) and text != shown:
                yield text[len(shown) :]
                shown = text
        text = self._text(tokens)
        if text != shown:
            yield text[len(shown) :] if text.startswith(shown) else text

    def fingerprint(self) -> str:
        """A digest of weights, vocabulary, chat template, image rule and pattern: engines alike have the same.

        Of each tensor an even sample of values is read, enough to tell trained checkpoints apart.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            probe = flat[:: max(1, flat.numel() // _PROBED_VALUES)].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + probe.numpy().tobytes())
        tokenizer = self.processor.tokenizer
        rule = self.processor.image_processor.to_dict()
        digest.update(repr((len(tokenizer), self.processor.chat_template, sorted(self.end_ids))).encode())
        digest.update(repr(sorted((str(key), str(value)) for key, value in rule.items())).encode())
        if self._sparse_config is not None:
            digest.update(repr(self._sparse_config).encode())
        return digest.hexdigest()[:16]

    def _room(self, prompts: Sequence[Example], max_new_tokens: int) -> int:
        """New tokens that fit behind the longest prompt in the positions that the language model has."""
        limit = position_limit(self.model)
        longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
        if limit is None or len(longest.input_ids) + max_new_tokens <= limit:
            return max_new_tokens
        return limit - len(longest.input_ids)

    def _too_long(self, prompt: Example) -> str | None:
        """Why a prompt cannot be answered at all, if so."""
        limit, length = position_limit(self.model), len(prompt.input_ids)
        if limit is None or length < limit:
            return None
        return f"a prompt of {length} tokens leaves no room for an answer in the model's {limit} positions"

    def _steps(self, prompts: Sequence[Example], max_new_tokens: int) -> Iterator[torch.Tensor]:
        inputs = {
            key: value.to(self.device) for key, value in collate_prompts(prompts, self.processor).items()
        }  # input_ids, attention_mask (batch, length), and the images
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return greedy_steps(
            self.model,
            inputs,
            max_new_tokens=self._room(prompts, max_new_tokens),
            end_ids=torch.tensor(sorted(self.end_ids), device=self.device),
            suppressed_ids=torch.tensor(self.suppressed_ids, device=self.device, dtype=torch.int64),
        )

    def _batch(self, prompts: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        rows = torch.stack(list(self._steps(prompts, max_new_tokens)), dim=1).tolist()  # (batch, new tokens)
        return [up_to_end(row, self.end_ids) for row in rows]

    def _text(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
