"""CoCa against NumPy in float64, what may see what, and equal losses however a batch is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from support.gradients import has_true_gradients
from support.tiny_models import tiny_tokenizer
from unclipped.objectives.caption_tokens import CaptionTokens
from unclipped.objectives.coca import CoCa, CoCaObjective
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.trunk import build_trunk

VIT: dict[str, Any] = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = 2
SMALL: dict[str, Any] = {
    "embedding_size": 6, "context_length": 12, "text_width": 8, "text_layers": 2, "text_heads": HEADS,
    "decoder_layers": 2, "caption_queries": 3,
}  # fmt: skip
CAPTIONS = ["a red circle", "two green square", "how many", "blue"]
Weights = dict[str, np.ndarray]


def objective(std: float = 0.3, **fields: Any) -> CoCaObjective:
    """In float64; the text side's weights large enough that every part of it counts."""
    torch.manual_seed(0)
    own = CoCaObjective.build(build_trunk(VIT, image_size=16), tiny_tokenizer(), PairsConfig(**(SMALL | fields)))
    for name, parameter in own.model.named_parameters():
        if not name.startswith("trunk.") and name != "log_scale":
            torch.nn.init.normal_(parameter, std=std)
    return own.double()


def batch(captions: list[str] = CAPTIONS) -> dict[str, torch.Tensor]:
    tokens = CaptionTokens(tiny_tokenizer(), 12)
    ids, mask = tokens.batch([tokens.row(caption, "test") for caption in captions])
    pixels = torch.randn(len(captions), 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


def norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def attention(x: np.ndarray, memory: np.ndarray, w: Weights, name: str, is_causal: bool) -> np.ndarray:
    width = x.shape[1]
    if name + ".in_proj_weight" in w:
        matrices = np.split(w[name + ".in_proj_weight"], 3)
    else:
        matrices = [w[f"{name}.{part}_proj_weight"] for part in "qkv"]
    biases = np.split(w[name + ".in_proj_bias"], 3)
    sides = (x, memory, memory)
    q, k, v = (side @ matrix.T + bias for side, matrix, bias in zip(sides, matrices, biases, strict=True))
    heads, each = [], width // HEADS
    for head in range(HEADS):
        part = slice(head * each, (head + 1) * each)
        scores = q[:, part] @ k[:, part].T / math.sqrt(each)
        if is_causal:
            scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(shares / shares.sum(axis=1, keepdims=True) @ v[:, part])
    return linear(np.concatenate(heads, axis=1), w, name + ".out_proj")


def feed_forward(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    hidden = linear(x, w, name + ".linear1")
    return linear(hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))), w, name + ".linear2")


def pool(patches: np.ndarray, w: Weights, name: str) -> np.ndarray:
    seen = norm(patches, w, name + ".norm")
    return norm(attention(w[name + ".queries"], seen, w, name + ".attention", False), w, name + ".final_norm")


def numpy_coca(w: Weights, patches: np.ndarray, tokens: list[int], start: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Image feature, text feature, and the summed cross-entropy of one caption without padding."""
    image = w["image_projection.weight"] @ pool(patches, w, "image_pool")[0]
    inputs = [start, *tokens[:-1]]
    x = w["text.tokens.weight"][inputs] + w["text.positions.weight"][: len(inputs)]
    x = np.concatenate([x, w["text.class_token"][None]])
    for block in range(SMALL["text_layers"]):
        name = f"text.blocks.{block}"
        seen = norm(x, w, name + ".norm1")
        x = x + attention(seen, seen, w, name + ".self_attn", True)
        x = x + feed_forward(norm(x, w, name + ".norm2"), w, name)
    text = w["text_projection.weight"] @ norm(x[-1], w, "text.norm")
    x, memory = x[:-1], pool(patches, w, "token_pool")
    for block in range(SMALL["decoder_layers"]):
        name = f"decoder.blocks.{block}"
        seen = norm(x, w, name + ".norm1")
        x = x + attention(seen, seen, w, name + ".self_attn", True)
        x = x + attention(norm(x, w, name + ".norm2"), memory, w, name + ".multihead_attn", False)
        x = x + feed_forward(norm(x, w, name + ".norm3"), w, name)
    scores = norm(x, w, "decoder.norm") @ w["decoder.head.weight"].T
    logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return image / np.linalg.norm(image), text / np.linalg.norm(text), -sum(logs[i, t] for i, t in enumerate(tokens))


def test_features_and_losses_equal_numpy() -> None:
    own, given = objective(contrastive_weight=0.7, caption_weight=1.6), batch()
    w = {name: value.detach().numpy() for name, value in own.model.named_parameters()}
    patches = own.model.trunk(given["pixel_values"]).patches.detach().numpy()
    lengths = given["attention_mask"].sum(dim=1).tolist()
    rows = [row[:length] for row, length in zip(given["input_ids"].tolist(), lengths, strict=True)]
    results = [numpy_coca(w, seen, row, own.model.start) for seen, row in zip(patches, rows, strict=True)]
    images, texts = (np.stack([result[side] for result in results]) for side in range(2))
    np.testing.assert_allclose(own.model.embed_images(given["pixel_values"]).detach().numpy(), images, rtol=1e-8)
    found = own.model.embed_text(given["input_ids"], given["attention_mask"])
    np.testing.assert_allclose(found.detach().numpy(), texts, rtol=1e-8)
    scores = images @ texts.T / 0.07
    contrastive = np.mean([np.log(np.exp(s).sum(axis=1)) - np.diag(s) for s in (scores, scores.T)])
    caption = sum(result[2] for result in results) / sum(lengths)
    output = own(**given)
    assert float(output["parts"]["contrastive"]) == pytest.approx(contrastive, rel=1e-6)
    assert float(output["parts"]["caption"]) == pytest.approx(caption, rel=1e-8)
    assert float(output["loss"].detach()) == pytest.approx(0.7 * contrastive + 1.6 * caption, rel=1e-6)


def test_in_float32_the_loss_differs_by_rounding() -> None:
    own, given = objective(), batch()
    exact = float(own(**given)["loss"].detach())
    found = own.float()(**given | {"pixel_values": given["pixel_values"].float()})["loss"]
    assert found.item() == pytest.approx(exact, abs=1e-5)


def test_gradients_of_the_loss() -> None:
    assert has_true_gradients(objective(), batch())


def scores_of(model: CoCa, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(given["pixel_values"], given["input_ids"], given["attention_mask"])[2]


def test_a_prediction_sees_the_image_and_earlier_tokens_only() -> None:
    model, given = objective().model, batch(["how many red circle", "blue square what is"])
    before = scores_of(model, given)
    place = 2
    changed = given | {"input_ids": given["input_ids"].clone()}
    changed["input_ids"][0, place] += 1
    after = scores_of(model, changed)
    torch.testing.assert_close(after[0, : place + 1], before[0, : place + 1])  # its own token is not seen either
    assert not torch.allclose(after[0, place + 1], before[0, place + 1])
    torch.testing.assert_close(after[1], before[1])
    other = scores_of(model, given | {"pixel_values": given["pixel_values"].flip(0)})
    assert not torch.allclose(other[0, 0], before[0, 0])


def test_the_compared_text_feature_knows_nothing_of_the_image_and_all_of_the_caption() -> None:
    model, given = objective().model, batch(["how many red circle"])
    before = model.embed_text(given["input_ids"], given["attention_mask"])
    length = int(given["attention_mask"].sum())
    for place in range(length - 1):  # every token but the end
        ids = given["input_ids"].clone()
        ids[0, place] += 1
        assert not torch.allclose(model.embed_text(ids, given["attention_mask"]), before)


def test_the_caption_loss_of_micro_batches_adds_up_to_that_of_the_whole() -> None:
    own, given = objective(contrastive_weight=0.0), batch()
    whole, counts = own(**given)["loss"], own.count(given)
    assert {name: int(count) for name, count in counts.items()} == {
        "pairs": 4, "tokens": int(given["attention_mask"].sum()),
    }  # fmt: skip
    parts = [own(counts=counts, **{key: value[rows] for key, value in given.items()}) for rows in ([0], [1, 2, 3])]
    torch.testing.assert_close(parts[0]["loss"] + parts[1]["loss"], whole)


def test_the_contrastive_loss_of_micro_batches_is_weighted_by_their_pairs() -> None:
    own, given = objective(), batch()
    counts = own.count(given)
    first = {key: value[:3] for key, value in given.items()}
    alone = own(**first)["parts"]["contrastive"]
    torch.testing.assert_close(own(counts=counts, **first)["parts"]["contrastive"], alone * 3 / 4)


def test_padding_does_not_enter_whatever_token_it_is() -> None:
    own, given = objective(), batch()
    ids = torch.where(given["attention_mask"] == 0, 17, given["input_ids"])
    torch.testing.assert_close(own(**given | {"input_ids": ids})["loss"], own(**given)["loss"])


def _process(rank: int, folder: str, given: dict[str, torch.Tensor]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = objective()
    part = slice(2 * rank, 2 * rank + 2)
    loss = own(counts=own.count(given), **{key: value[part] for key, value in given.items()})["loss"]
    (2 * loss).backward()  # as the trainer scales a counted loss whose gradients are then averaged
    torch.save([loss.detach(), [p.grad for p in own.model.parameters() if p.requires_grad]], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    given = batch()
    mp.start_processes(_process, args=(str(tmp_path), given), nprocs=2, start_method="fork")
    (one, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    own = objective()
    loss = own(**given)["loss"]
    loss.backward()
    torch.testing.assert_close(one + other, loss.detach())
    for parameter, a, b in zip((p for p in own.model.parameters() if p.requires_grad), first, second, strict=True):
        torch.testing.assert_close((a + b) / 2, parameter.grad)
