"""Losses over pairs and zero-shot classes against open_clip (MIT), in float32: values and gradients within 1e-5."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.oracles import oracle
from support.tiny_models import tiny_tokenizer
from unclipped.audit.zero_shot import class_weights
from unclipped.images.config import ImageRule
from unclipped.objectives.caption_tokens import CaptionTokens
from unclipped.objectives.coca import CoCaObjective
from unclipped.objectives.contrastive import ContrastiveObjective
from unclipped.objectives.pair_losses import info_nce, sigmoid_loss
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.text_side import TextSide
from unclipped.objectives.trunk import build_trunk

VIT: dict[str, Any] = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL: dict[str, Any] = {
    "embedding_size": 6, "context_length": 12, "text_width": 8, "text_layers": 1, "text_heads": 2,
    "decoder_layers": 1, "caption_queries": 3,
}  # fmt: skip
CAPTIONS = ["a red circle", "two green square", "how many", "blue"]


def pairs(batch: int, *scalars: float, width: int = 32) -> list[Tensor]:
    """Unit vectors of images and texts, (batch, width), that lean towards their partners; then parameters (1,)."""
    images = torch.randn(batch, width)
    texts = images + torch.randn(batch, width)
    values = [F.normalize(images, dim=1), F.normalize(texts, dim=1), *(torch.tensor([value]) for value in scalars)]
    return [value.requires_grad_() for value in values]


def assert_equal_with_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for own, theirs in zip(
        torch.autograd.grad(found, inputs, retain_graph=True), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 100.0])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_info_nce_is_clip_loss(batch: int, scale: float, chunk: int | None) -> None:
    images, texts, log_scale = values = pairs(batch, math.log(scale))
    expected = oracle("open_clip.loss").ClipLoss()(images, texts, log_scale.exp())
    assert_equal_with_gradients(info_nce(images, texts, log_scale, chunk=chunk), expected, values)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.5), (100.0, -12.0)])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_sigmoid_is_siglip_loss(batch: int, scale: float, bias: float, chunk: int | None) -> None:
    images, texts, log_scale, offset = values = pairs(batch, math.log(scale), bias)
    expected = oracle("open_clip.loss").SigLipLoss()(images, texts, log_scale.exp(), offset)
    assert_equal_with_gradients(sigmoid_loss(images, texts, log_scale, offset, chunk=chunk), expected, values)


@pytest.mark.parametrize("weights", [(2.0, 1.0), (0.7, 1.6)])
def test_coca_is_coca_loss_down_to_every_parameter(weights: tuple[float, float]) -> None:
    caption, contrastive = weights
    config = PairsConfig(**SMALL, caption_weight=caption, contrastive_weight=contrastive)
    own: Any = CoCaObjective.build(build_trunk(VIT, image_size=16), tiny_tokenizer(), config)
    for name, parameter in own.model.named_parameters():
        if not name.startswith("trunk.") and name != "log_scale":
            torch.nn.init.normal_(parameter, std=0.3)  # fresh features are short: large gradients
    tokens = CaptionTokens(tiny_tokenizer(), 12)
    ids, mask = tokens.batch([tokens.row(text, "test") for text in CAPTIONS])
    pixels = torch.randn(len(ids), 3, 16, 16)
    images, texts, scores = own.model(pixels, ids, mask)
    ignored = -7  # theirs leaves out one id; padding's own may be a word's, and is the end's in some tokenizers
    theirs = oracle("open_clip.loss").CoCaLoss(caption, contrastive, pad_id=ignored)
    expected = sum(theirs(images, texts, scores, ids.masked_fill(mask == 0, ignored), own.model.log_scale.exp()))
    assert isinstance(expected, Tensor)
    found = own(pixel_values=pixels, input_ids=ids, attention_mask=mask)["loss"]
    trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
    assert len(trained) > 40
    assert_equal_with_gradients(found, expected, trained)


@pytest.mark.parametrize("at_once", [1, 3, 10, None])
def test_class_weights_are_those_of_a_zero_shot_classifier(at_once: int | None) -> None:
    own: Any = ContrastiveObjective.build(build_trunk(VIT, image_size=16), tiny_tokenizer(), PairsConfig(**SMALL))
    captions = CaptionTokens(tiny_tokenizer(), 12)
    side = TextSide(own.model, captions, ImageRule(rule="squash", size=(16, 16)), "contrastive")
    classes, templates = ["red", "green", "blue circle", "square", "two"], ["a {}", "how many {}", "{}"]

    class Theirs:
        """What open_clip asks of a model: embeddings of what its tokenizer gave."""

        @staticmethod
        def encode_text(texts: Tensor, normalize: bool) -> Tensor:
            ids, mask = texts.unbind()
            features = own.model.text_projection(own.model.text(ids, mask).pooled)
            return F.normalize(features, dim=-1) if normalize else features

    def tokenizer(texts: list[str]) -> Tensor:
        return torch.stack(captions.batch([captions.row(text, "test") for text in texts]))  # (2, texts, T)

    build = oracle("open_clip.zero_shot_classifier").build_zero_shot_classifier
    expected = build(Theirs(), tokenizer, classes, templates, num_classes_per_batch=at_once)  # (D, classes)
    torch.testing.assert_close(class_weights(side, classes, templates), expected.T, atol=1e-5, rtol=0)
