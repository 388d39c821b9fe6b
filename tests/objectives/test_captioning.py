"""Captioning against NumPy in float64 in both modes, what may see what, and equal losses however a batch is cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from support.gradients import has_true_gradients
from support.tiny_models import tiny_tokenizer
from unclipped.core.errors import UsageError
from unclipped.objectives.base import OBJECTIVES
from unclipped.objectives.caption_tokens import CaptionTokens
from unclipped.objectives.captioning import Captioner, CaptioningObjective, hidden_places
from unclipped.objectives.captioning_config import CaptioningConfig
from unclipped.objectives.health import undisturbed
from unclipped.objectives.trunk import build_trunk

VIT: dict[str, Any] = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS, LAYERS, CONTEXT = 2, 2, 12
CAPTIONS = ["a red circle", "two green square", "how many", "blue"]
MIXED = [True, False, False, True]
Weights = dict[str, np.ndarray]


def objective(*, std: float | None = 0.3, bias: bool = False) -> Any:
    """In float64; the decoder's weights large enough that every part of it counts."""
    torch.manual_seed(0)
    tokenizer, config = tiny_tokenizer(), CaptioningConfig(width=8, layers=LAYERS, heads=HEADS, bias=bias)
    start = tokenizer.eos_token_id
    model = Captioner(build_trunk(VIT, image_size=16), len(tokenizer), config, context_length=CONTEXT, start=start)
    for name, parameter in model.named_parameters():
        if std is not None and not name.startswith("trunk."):
            torch.nn.init.normal_(parameter, std=std)
    return CaptioningObjective(model).double()


def batch(parallel: list[bool] = MIXED, captions: list[str] = CAPTIONS) -> dict[str, torch.Tensor]:
    tokens = CaptionTokens(tiny_tokenizer(), CONTEXT)
    ids, mask = tokens.batch([tokens.row(caption, "test") for caption in captions])
    pixels = torch.randn(len(captions), 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "parallel": torch.tensor(parallel)}


def norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * w[name + ".weight"] + bias(w, name)


def bias(w: Weights, name: str) -> Any:
    return w.get(name + ".bias", 0.0)


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return x @ w[name + ".weight"].T + bias(w, name)


def attention(x: np.ndarray, memory: np.ndarray, w: Weights, name: str, *, is_causal: bool) -> np.ndarray:
    width = x.shape[1]
    matrices, biases = np.split(w[name + ".in_proj_weight"], 3), np.zeros((3, width))
    if name + ".in_proj_bias" in w:
        biases = np.stack(np.split(w[name + ".in_proj_bias"], 3))
    q, k, v = (side @ m.T + b for side, m, b in zip((x, memory, memory), matrices, biases, strict=True))
    result = np.zeros_like(x)
    for place in range(len(x)):
        seen = place + 1 if is_causal else len(memory)
        for head in np.split(np.arange(width), HEADS):
            scores = k[:seen, head] @ q[place, head] / math.sqrt(len(head))
            shares = np.exp(scores - scores.max())
            result[place, head] = shares @ v[:seen, head] / shares.sum()
    return linear(result, w, name + ".out_proj")


def numpy_loss(w: Weights, patches: np.ndarray, tokens: list[int], start: int, is_parallel: bool) -> float:
    """Summed cross-entropy of one caption without padding."""
    if is_parallel:
        x = np.repeat(w["mask_token"][None], len(tokens), axis=0)
    else:
        x = w["tokens.weight"][[start, *tokens[:-1]]]
    x = x + w["positions.weight"][: len(tokens)]
    image = linear(patches, w, "image_projection")
    for block in range(LAYERS):
        name = f"decoder.blocks.{block}"
        seen = norm(x, w, name + ".norm1")
        x = x + attention(seen, seen, w, name + ".self_attn", is_causal=not is_parallel)
        x = x + attention(norm(x, w, name + ".norm2"), image, w, name + ".multihead_attn", is_causal=False)
        hidden = linear(norm(x, w, name + ".norm3"), w, name + ".linear1")
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + linear(hidden, w, name + ".linear2")
    scores = norm(x, w, "decoder.norm") @ w["decoder.head.weight"].T
    logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return -float(sum(logs[place, token] for place, token in enumerate(tokens)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parallel", [[False] * 4, [True] * 4, MIXED], ids=["autoregressive", "parallel", "mixed"])
def test_the_loss_equals_numpy(parallel: list[bool], bias: bool) -> None:
    own, rows = objective(bias=bias), batch(parallel)
    w = {name: value.detach().numpy() for name, value in own.model.named_parameters()}
    patches = own.model.trunk(rows["pixel_values"]).patches.detach().numpy()
    lengths = rows["attention_mask"].sum(dim=1).tolist()
    total = sum(
        numpy_loss(w, patches[i], rows["input_ids"][i, :length].tolist(), own.model.start, parallel[i])
        for i, length in enumerate(lengths)
    )
    output = own(**rows)
    assert float(output["loss"].detach()) == pytest.approx(total / sum(lengths), rel=1e-9)
    assert float(output["parts"]["caption"]) == float(output["loss"].detach())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=4))
def test_the_masks_are_those_of_a_loop_over_places(rows: list[tuple[int, bool]]) -> None:
    longest = max(length for length, _ in rows)
    attention_mask = torch.tensor([[1] * length + [0] * (longest - length) for length, _ in rows])
    hidden = hidden_places(attention_mask, torch.tensor([is_parallel for _, is_parallel in rows]))
    for row, (length, is_parallel) in enumerate(rows):
        for place in range(longest):
            for other in range(longest):
                is_hidden = other >= length or (not is_parallel and other > place)
                assert bool(hidden[row, place, other]) == is_hidden


def test_in_float32_the_loss_differs_by_rounding() -> None:
    own, rows = objective(), batch()
    exact = float(own(**rows)["loss"].detach())
    found = own.float()(**rows | {"pixel_values": rows["pixel_values"].float()})["loss"]
    assert found.item() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("parallel", [[False] * 4, [True] * 4, MIXED], ids=["autoregressive", "parallel", "mixed"])
def test_gradients_of_the_loss(parallel: list[bool]) -> None:
    assert has_true_gradients(objective(), batch(parallel))


def scores_of(own: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    return own.model(**{("pixels" if key == "pixel_values" else key): value for key, value in rows.items()})


def test_a_later_token_changes_nothing_in_an_autoregressive_row() -> None:
    own, rows = objective(), batch([False, False], ["how many red circle", "blue square what is"])
    before, place = scores_of(own, rows), 2
    ids = rows["input_ids"].clone()
    ids[0, place] += 1
    after = scores_of(own, rows | {"input_ids": ids})
    torch.testing.assert_close(after[0, : place + 1], before[0, : place + 1])  # its own token is not seen either
    assert not torch.allclose(after[0, place + 1], before[0, place + 1])
    torch.testing.assert_close(after[1], before[1])


def test_no_token_matters_to_a_parallel_row_but_the_image_and_the_place_do() -> None:
    own, rows = objective(), batch([True, True], ["how many red circle", "blue square what is"])
    before = scores_of(own, rows)
    other = torch.randint_like(rows["input_ids"], 5, 20)
    assert torch.equal(scores_of(own, rows | {"input_ids": other}), before)
    assert not torch.allclose(before[0, 0], before[0, 1])
    assert not torch.allclose(scores_of(own, rows | {"pixel_values": rows["pixel_values"].flip(0)})[0], before[0])


def test_padding_does_not_enter_whatever_it_is_and_however_long() -> None:
    own, rows = objective(), batch()
    loss = own(**rows)["loss"]
    ids, mask = rows["input_ids"], rows["attention_mask"]
    torch.testing.assert_close(own(**rows | {"input_ids": torch.where(mask == 0, 17, ids)})["loss"], loss)
    pad = torch.nn.functional.pad
    longer = {"input_ids": pad(ids, (0, 3), value=11), "attention_mask": pad(mask, (0, 3))}
    torch.testing.assert_close(own(**rows | longer)["loss"], loss)


def test_the_losses_of_micro_batches_add_up_to_that_of_the_whole() -> None:
    own, rows = objective(), batch()
    whole, counts = own(**rows)["loss"], own.count(rows)
    assert {name: int(count) for name, count in counts.items()} == {"tokens": int(rows["attention_mask"].sum())}
    parts = [own(counts=counts, **{key: value[cut] for key, value in rows.items()}) for cut in ([0], [1, 2, 3])]
    torch.testing.assert_close(parts[0]["loss"] + parts[1]["loss"], whole)


@pytest.mark.parametrize("parallel", [[False] * 4, [True] * 4])
def test_every_parameter_has_a_gradient_whatever_the_modes_of_a_batch(parallel: list[bool]) -> None:
    own = objective()
    own(**batch(parallel))["loss"].backward()
    assert [name for name, value in own.named_parameters() if value.requires_grad and value.grad is None] == []


def test_a_fresh_decoder_finds_all_tokens_equally_likely_and_has_no_biases() -> None:
    own = objective(std=None)
    assert float(own(**batch())["loss"].detach()) == pytest.approx(math.log(own.model.tokens.num_embeddings))
    names = [name for name, _ in own.model.named_parameters() if not name.startswith("trunk.")]
    assert not [name for name in names if "bias" in name]
    assert OBJECTIVES.get("captioning") is CaptioningObjective


def test_health_is_that_of_the_mean_patch() -> None:
    own, rows = objective(), batch()
    with undisturbed(own, torch.device("cpu")):
        health = own.health(rows)
    features = own.model.trunk(rows["pixel_values"]).patches.mean(dim=1).detach().numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert health["spread"] == pytest.approx(4 * unit.std(axis=0).mean(), rel=1e-6)
    assert own.num_tokens(rows) == 4 * 4 + int(rows["attention_mask"].sum())


def test_bad_settings_and_rows() -> None:
    with pytest.raises(ValidationError, match=r"width \(10\) is no multiple of heads \(4\)"):
        CaptioningConfig(width=10, heads=4)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        CaptioningConfig(parallel_share=1.5)
    own, rows = objective(), batch()
    long = {name: rows[name].repeat(1, 4) for name in ("input_ids", "attention_mask")}
    with pytest.raises(UsageError, match=r"a caption of \d+ tokens, the decoder's longest is 12; raise pairs\.context"):
        own(**rows | long)
