"""Classes from their names, and images from captions: for models that put images and texts into one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from unclipped.audit.config import PLAIN_TEMPLATES
from unclipped.core.errors import DataError, UsageError

_SIMILARITIES_AT_ONCE = 16_000_000  # 64 MB of float32


@runtime_checkable
class ImageTextModel(Protocol):
    """What zero-shot needs: embeddings of images and of texts in one space; normalised here."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """pixels as the model takes them, first axis B -> (B, D)."""
        ...

    def encode_text(self, texts: list[str]) -> Tensor:
        """B texts -> (B, D)."""
        ...


def require_text_side(model: Any, name: str) -> ImageTextModel:
    """`model` itself. Raises UsageError when it has no `encode_text`: an encoder of images alone knows no names."""
    if not isinstance(model, ImageTextModel):
        raise UsageError(
            f"{name}: zero-shot and retrieval need a text side (encode_images and encode_text), which "
            f"{type(model).__name__} lacks; use the k-NN or linear probe, or a model trained on image-text pairs"
        )
    return model


@torch.no_grad()
def class_weights(
    model: ImageTextModel, classes: Sequence[str], templates: Sequence[str] = PLAIN_TEMPLATES, batch_size: int = 256
) -> Tensor:
    """One unit vector a class, (C, D): the mean of its prompts' normalised embeddings, normalised again.

    Each template holds `{}` where the name goes. Raises UsageError for a template without it. Source: the prompt
    ensembles of arXiv 2103.00020, section 3.1.4.
    """
    if not templates:
        raise UsageError("templates: expected at least one prompt with {} where the name of the class goes")
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(f"template {template!r}: expected exactly one {{}}, where the name of the class goes")
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    embedded = encode_texts(model, prompts, batch_size)  # (C·T, D)
    return functional.normalize(embedded.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


@torch.no_grad()
def encode_texts(model: ImageTextModel, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit vectors (texts, D), in float32."""
    parts = [model.encode_text(list(texts[i : i + batch_size])) for i in range(0, len(texts), batch_size)]
    return functional.normalize(torch.cat(parts).float(), dim=-1)


def zero_shot_predict(images: Tensor, weights: Tensor) -> Tensor:
    """images (B, D), weights (C, D) of `class_weights` -> classes (B,); the lowest number wins a tie."""
    return (functional.normalize(images.float(), dim=-1) @ weights.T).argmax(dim=-1)


def recall_at_k(
    images: Tensor, texts: Tensor, image_of_text: Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[int, NDArray[np.float64]]]:
    """Hits of retrieval both ways, 0 or 1 an item: {"image_to_text": {k: (I,)}, "text_to_image": {k: (T,)}}.

    images (I, D), texts (T, D); image_of_text (T,): the image that each text describes; an image may have several texts
    and is found by any of them. The rank of a right item counts the wrong ones that are at least as similar, so a model
    that gives everything one similarity finds nothing. Raises DataError when an image has no text, or k exceeds the
    number of candidates.
    """
    owner = torch.as_tensor(list(image_of_text), dtype=torch.long)
    if len(owner) != len(texts):
        raise DataError(f"image_of_text: expected one image a text, found {len(owner)} for {len(texts)} texts")
    missing = sorted(set(range(len(images))) - set(owner.tolist()))
    if missing or (len(owner) and int(owner.max()) >= len(images)):
        raise DataError(
            f"image_of_text: image {missing[0]} has no text; every image needs at least one"
            if missing
            else f"image_of_text: names image {int(owner.max())}, but there are {len(images)} images"
        )
    most = min(len(images), len(texts))
    if max(ks) > most or min(ks) < 1:
        raise DataError(f"recall at {max(ks)}: expected 1 to {most}, the number of candidates; choose smaller k")
    images = functional.normalize(images.float(), dim=-1)
    texts = functional.normalize(texts.float(), dim=-1)
    rows = torch.arange(len(images))
    text_ranks, image_ranks = [], []
    for index in rows.split(max(1, _SIMILARITIES_AT_ONCE // len(texts))):
        similarity = images[index] @ texts.T  # (i, T)
        is_own = owner[None] == index[:, None]
        best = similarity.masked_fill(~is_own, -torch.inf).amax(dim=1, keepdim=True)
        text_ranks.append(((similarity >= best) & ~is_own).sum(dim=1))
    columns = torch.arange(len(texts))
    for index in columns.split(max(1, _SIMILARITIES_AT_ONCE // len(images))):
        similarity = texts[index] @ images.T  # (t, I)
        right = similarity.gather(1, owner[index, None])
        is_own = owner[index, None] == rows[None]
        image_ranks.append(((similarity >= right) & ~is_own).sum(dim=1))
    ranks = {"image_to_text": torch.cat(text_ranks), "text_to_image": torch.cat(image_ranks)}
    return {way: {k: (rank < k).double().numpy() for k in ks} for way, rank in ranks.items()}
