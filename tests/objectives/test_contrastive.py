"""The contrastive and the sigmoid objective: two towers, poolings of text, captions in tokens, counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from support.tiny_models import tiny_tokenizer
from unclipped.core.errors import DataError, UsageError
from unclipped.objectives.base import OBJECTIVES
from unclipped.objectives.caption_tokens import CaptionTokens
from unclipped.objectives.contrastive import ContrastiveObjective
from unclipped.objectives.health import undisturbed
from unclipped.objectives.pair_losses import info_nce, sigmoid_loss
from unclipped.objectives.pairs import PairObjective
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.sigmoid import SigmoidObjective
from unclipped.objectives.text_side import PAIR_OBJECTIVES
from unclipped.objectives.text_tower import TextTower
from unclipped.objectives.trunk import build_trunk

VIT: dict[str, Any] = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL: dict[str, Any] = {
    "embedding_size": 6, "context_length": 12, "text_width": 8, "text_layers": 2, "text_heads": 2,
    "decoder_layers": 1, "caption_queries": 3,
}  # fmt: skip
CAPTIONS = ["a red circle", "two green square", "how many", "blue"]


def objective(name: str, **fields: Any) -> PairObjective:
    torch.manual_seed(0)
    trunk = build_trunk(VIT, image_size=16)
    return PAIR_OBJECTIVES[name].build(trunk, tiny_tokenizer(), PairsConfig(**(SMALL | fields)))


def batch(captions: list[str] = CAPTIONS) -> dict[str, torch.Tensor]:
    tokens = CaptionTokens(tiny_tokenizer(), 12)
    ids, mask = tokens.batch([tokens.row(caption, "test") for caption in captions])
    pixels = torch.randn(len(captions), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


def test_every_pair_objective_is_registered_under_its_name() -> None:
    assert {name: OBJECTIVES.get(name) for name in PAIR_OBJECTIVES} == PAIR_OBJECTIVES
    assert {name: kind.declared for name, kind in PAIR_OBJECTIVES.items()} == {
        "contrastive": "contrastive", "sigmoid": "sigmoid", "coca": "contrastive",
    }  # fmt: skip


def test_the_losses_are_those_of_the_embeddings() -> None:
    given = batch()
    own: Any = objective("contrastive")
    images, texts = (
        own.model.embed_images(given["pixel_values"]),
        own.model.embed_text(given["input_ids"], given["attention_mask"]),
    )
    assert images.shape == texts.shape == (4, 6)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(4))
    assert float(own.model.log_scale.detach()) == pytest.approx(math.log(1 / 0.07))
    torch.testing.assert_close(own(**given)["loss"], info_nce(images, texts, own.model.log_scale))
    other: Any = objective("sigmoid")
    images = other.model.embed_images(given["pixel_values"])
    texts = other.model.embed_text(given["input_ids"], given["attention_mask"])
    assert (float(other.model.log_scale.detach()), float(other.model.bias.detach())) == pytest.approx(
        (math.log(10), -10)
    )
    expected = sigmoid_loss(images, texts, other.model.log_scale, other.model.bias)
    torch.testing.assert_close(other(**given)["loss"], expected)


@pytest.mark.parametrize("name", list(PAIR_OBJECTIVES))
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_every_parameter_learns_and_the_loss_falls(name: str, pooling: str) -> None:
    own, given = objective(name, text_pooling=pooling, chunk=3).train(), batch()
    trained = {key: p for key, p in own.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for step in range(15):
        loss = own(**given)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert not [key for key, p in trained.items() if p.grad is None]
        optimizer.step()
        own.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert own.num_samples(given) == 4
    assert own.num_tokens(given) == 4 * 4 + int(given["attention_mask"].sum())


def test_after_a_step_the_scale_is_at_most_a_hundred() -> None:
    for name in ("contrastive", "coca"):
        own: Any = objective(name)
        with torch.no_grad():
            own.model.log_scale.fill_(9.0)
        own.after_step()
        assert float(own.model.log_scale.detach().exp()) == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("name", list(PAIR_OBJECTIVES))
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("is_training", [True, False])
def test_a_caption_is_embedded_alike_alone_and_beside_longer_ones(name: str, pooling: str, is_training: bool) -> None:
    model: Any = objective(name, text_pooling=pooling).model.train(is_training)
    with torch.set_grad_enabled(is_training):
        together = model.embed_text(*(batch()[key] for key in ("input_ids", "attention_mask")))
        for number, caption in enumerate(CAPTIONS):
            alone = model.embed_text(*(batch([caption])[key] for key in ("input_ids", "attention_mask")))
            torch.testing.assert_close(alone[0], together[number], rtol=1e-5, atol=1e-6)


def numpy_tower(tower: TextTower, ids: list[int], is_causal: bool) -> np.ndarray:
    """The final norm's output (T, W) for one unpadded row."""
    weights = {name: value.detach().numpy() for name, value in tower.named_parameters()}
    x = weights["tokens.weight"][ids] + weights["positions.weight"][: len(ids)]
    for block in range(2):
        x = numpy_block(x, weights, f"blocks.{block}.", is_causal)
    return norm(x, weights, "norm.")


def norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[name + "weight"] + weights[name + "bias"]


def numpy_block(x: np.ndarray, weights: dict[str, np.ndarray], name: str, is_causal: bool) -> np.ndarray:
    seen = norm(x, weights, name + "norm1.")
    projected = seen @ weights[name + "self_attn.in_proj_weight"].T + weights[name + "self_attn.in_proj_bias"]
    width, parts = x.shape[1], []
    for head in range(2):
        q, k, v = (projected[:, part * width :][:, head * width // 2 : (head + 1) * width // 2] for part in range(3))
        scores = q @ k.T / math.sqrt(width / 2)
        if is_causal:
            scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        parts.append(shares / shares.sum(axis=1, keepdims=True) @ v)
    out = np.concatenate(parts, axis=1) @ weights[name + "self_attn.out_proj.weight"].T
    x = x + out + weights[name + "self_attn.out_proj.bias"]
    hidden = norm(x, weights, name + "norm2.") @ weights[name + "linear1.weight"].T + weights[name + "linear1.bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + hidden @ weights[name + "linear2.weight"].T + weights[name + "linear2.bias"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_text_tower_equals_numpy(pooling: str) -> None:
    torch.manual_seed(3)
    tower = TextTower(40, PairsConfig(**SMALL), pooling=pooling).double()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    rows = [[5, 9, 2, 31, 7], [1, 8, 3], [30]]
    ids = torch.tensor([[*row, *[0] * (5 - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (5 - len(row)) for row in rows])
    pooled = tower(ids, mask).pooled.detach().numpy()
    for number, row in enumerate(rows):
        states = numpy_tower(tower, row, is_causal=pooling == "last")
        expected = states[-1] if pooling == "last" else states.mean(axis=0)
        np.testing.assert_allclose(pooled[number], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [ContrastiveObjective, SigmoidObjective])
def test_an_uncounted_objective_returns_the_mean_over_the_batch(kind: type[PairObjective]) -> None:
    own = kind.build(build_trunk(VIT, image_size=16), tiny_tokenizer(), PairsConfig(**SMALL))
    assert own.count(batch()) == {}


def test_captions_become_rows_that_end() -> None:
    tokenizer = tiny_tokenizer()
    tokens = CaptionTokens(tokenizer, 5, "cut")
    row = tokens.row("a", "x")
    assert row[-1] == tokenizer.eos_token_id
    long = tokens.row("how many red circle is this what", "x")
    assert len(long) == 5
    assert long[-1] == tokenizer.eos_token_id
    ids, mask = tokens.batch([row, long])
    assert ids.shape == mask.shape == (2, 5)
    assert mask.sum(dim=1).tolist() == [len(row), 5]


def test_bad_captions() -> None:
    tokens = CaptionTokens(tiny_tokenizer(), 5)
    with pytest.raises(DataError, match=r"sample 7: the caption is empty"):
        tokens.row(" \n", "sample 7")
    with pytest.raises(DataError, match=r"sample 7: the caption has \d+ tokens, more than pairs\.context_length 5"):
        tokens.row("how many red circle is this what", "sample 7")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end-of-text token"):
        CaptionTokens(tokenizer, 5)


def test_bad_configuration() -> None:
    with pytest.raises(ValidationError, match=r"text_width \(10\) is no multiple of text_heads \(4\)"):
        PairsConfig(text_width=10)


@pytest.mark.parametrize("name", list(PAIR_OBJECTIVES))
def test_health_measures_the_images_features_and_disturbs_nothing(name: str) -> None:
    own, given = objective(name), batch()
    before = {key: value.clone() for key, value in own.state_dict().items()}
    with undisturbed(own, torch.device("cpu")):
        health = own.health(given)
    output = own.model.trunk(given["pixel_values"])
    features = (output.patches.mean(dim=1) if name == "coca" else output.pooled).detach().double().numpy()  # (4, 16)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    share = values[:-1] / values[:-1].sum()  # centring leaves one direction fewer than images
    assert health["images"] == 4
    assert health["spread"] == pytest.approx(4 * unit.std(axis=0).mean(), rel=1e-5)
    assert health["rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())
    same = given | {"pixel_values": given["pixel_values"][:1].expand(4, -1, -1, -1)}
    with undisturbed(own, torch.device("cpu")):
        assert own.health(same)["spread"] < 1e-4  # constant features are seen as such
