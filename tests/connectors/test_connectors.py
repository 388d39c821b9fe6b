"""Connectors: text form, counts, steps on packed features of mixed grids, standardisation, start."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.connectors.build import build_connector
from unclipped.connectors.config import ConnectorConfig, parse_connector
from unclipped.connectors.parts.base import PROJECTIONS, STEPS
from unclipped.connectors.parts.standard import MLP, Average, Linear, PixelShuffle, Resample
from unclipped.core.errors import UsageError

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
steps = st.one_of(*(st.builds(STEPS.get(name), size=sizes) for name in STEPS.names()))
configs = st.builds(
    ConnectorConfig,
    before=st.lists(steps, max_size=3).map(tuple),
    projection=st.one_of(st.just(Linear()), st.builds(MLP, layers=st.integers(1, 4))),
    standardise=st.booleans(),
)


@settings(deadline=None, max_examples=50)
@given(configs)
def test_text_and_saved_form_round_trip(config: ConnectorConfig) -> None:
    assert parse_connector(str(config)) == config
    assert ConnectorConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_form_of_saved_files_that_has_no_projection_object() -> None:
    saved = {"before": [{"kind": "average", "size": [2, 2]}], "kind": "mlp", "layers": 3, "standardise": True}
    assert str(ConnectorConfig.model_validate(saved)) == "average(2) + standardise + mlp(3)"
    assert str(ConnectorConfig.model_validate({"kind": "linear", "layers": 1})) == "linear"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("mlp", "mlp(2)"),
        ("average(2) + mlp(2)", "average(2) + mlp(2)"),
        ("pixel_shuffle(4x1)+linear", "pixel_shuffle(4x1) + linear"),
        ("resample(4x4)+linear", "resample(4x4) + linear"),
        ("pixel_shuffle(2,3) + standardise + mlp(3)", "pixel_shuffle(2x3) + standardise + mlp(3)"),
    ],
)
def test_text_form(text: str, canonical: str) -> None:
    assert str(parse_connector(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixelshuffle(2) + mlp", "did you mean 'pixel_shuffle'"),
        ("average(2)", "no projection"),
        ("mlp + average(2)", "after the projection"),
        ("average + mlp", "needs a size"),
        ("average(0) + mlp", "size of 'average' must be at least 1, found 0x0"),
        ("linear(3)", "'linear': cannot read '3'; its options are: none"),
        ("mlp(0)", "layers of 'mlp' must be at least 1, found 0"),
        ("standardise + average(2) + mlp", "after 'standardise'"),
        ("mlp((2))", "cannot read"),
        ("mlp(2, 3)", "cannot read '3'; its options are: layers"),
        ("mlp(layers=2, layers=3)", "cannot read 'layers=3'"),
        ("mlp(depth=2)", "its options are: layers"),
        ("mlp(two)", "layers of 'mlp'"),
        ("resample(99999x2) + mlp", "at most 1,024"),
    ],
)
def test_bad_text_names_the_part(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_connector(text)


def test_indivisible_grid_names_grid_and_factor() -> None:
    connector = build_connector(parse_connector("average(2x3) + linear"), 8, 16)
    with pytest.raises(UsageError, match=r"5x6 is not divisible by 2x3"):
        connector(torch.zeros(30, 8), torch.tensor([[1, 5, 6]]))


def test_wrong_number_of_features_is_named() -> None:
    connector = build_connector(parse_connector("linear"), 8, 16)
    with pytest.raises(UsageError, match="expected 6 features of width 8"):
        connector(torch.zeros(5, 8), torch.tensor([[1, 2, 3]]))


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_pixel_shuffle_has_an_exact_inverse(size: tuple[int, int], rows: int, columns: int, width: int) -> None:
    features = torch.randn(2, rows * size[0], columns * size[1], width)
    step = PixelShuffle(size=size)
    assert torch.equal(step.inverse(step.apply(features)), features)


def test_pixel_shuffle_keeps_blocks_together() -> None:
    features = torch.arange(8.0).reshape(1, 2, 4, 1)
    assert PixelShuffle(size=(2, 2)).apply(features).tolist() == [[[[0, 1, 4, 5], [2, 3, 6, 7]]]]


def test_average_is_the_block_mean() -> None:
    features = torch.randn(2, 4, 6, 3)
    expected = torch.nn.functional.avg_pool2d(features.permute(0, 3, 1, 2), (2, 3)).permute(0, 2, 3, 1)
    torch.testing.assert_close(Average(size=(2, 3)).apply(features), expected)


def test_resample_keeps_constants_and_the_identity() -> None:
    features = torch.randn(1, 3, 5, 4)
    assert torch.equal(Resample(size=(3, 5)).apply(features), features)
    torch.testing.assert_close(
        Resample(size=(4, 4)).apply(torch.full((1, 7, 3, 2), 2.5)), torch.full((1, 4, 4, 2), 2.5)
    )
    halves = Resample(size=(1, 2)).apply(torch.tensor([0.0, 0.0, 1.0, 1.0]).reshape(1, 1, 4, 1)).flatten()
    torch.testing.assert_close(halves, torch.tensor([1 / 7, 6 / 7]))  # antialiased triangle over four cells


def test_resample_works_in_fp32_and_returns_the_dtype() -> None:
    features = torch.randn(1, 6, 6, 4)
    low = Resample(size=(4, 4)).apply(features.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, Resample(size=(4, 4)).apply(features.bfloat16().float()).bfloat16())


TEXTS = [f"{STEPS.get(step).example()} + {kind}" for step in STEPS.names() for kind in PROJECTIONS.names()]
TEXTS += [PROJECTIONS.get(kind).example() for kind in PROJECTIONS.names()]
GRIDS = torch.tensor([[1, 2, 4], [1, 4, 2], [1, 2, 4], [2, 4, 4]])


@pytest.mark.parametrize("text", TEXTS)
def test_contract_of_every_connector(text: str) -> None:
    """Shapes, counts, no mixing of images: one image alone equals the same image in a batch of other grids."""
    config = parse_connector(text)
    connector = build_connector(config, 8, 16)
    features = torch.randn(int(GRIDS.prod(dim=1).sum()), 8, requires_grad=True)
    tokens, grids = connector(features, GRIDS)
    counts = connector.num_tokens(GRIDS)
    assert counts.dtype == torch.int64
    assert counts.tolist() == config.num_tokens(GRIDS.tolist()) == grids.prod(dim=1).tolist()
    assert tokens.shape == (int(counts.sum()), 16)
    pieces = features.split(GRIDS.prod(dim=1).tolist())
    for piece, grid, expected in zip(pieces, GRIDS, tokens.split(counts.tolist()), strict=True):
        alone, alone_grid = connector(piece, grid[None])
        torch.testing.assert_close(alone, expected, atol=1e-6, rtol=1e-5)
        assert int(alone_grid.prod()) == len(expected)
    tokens.sum().backward()
    assert features.grad is not None
    assert bool(features.grad.abs().sum(dim=1).gt(0).all()), "every patch reaches a token"
    assert all(parameter.grad is not None for parameter in connector.parameters())


def test_no_images_give_no_tokens() -> None:
    tokens, grids = build_connector(parse_connector("linear"), 8, 16)(
        torch.zeros(0, 8), torch.zeros(0, 3, dtype=torch.int64)
    )
    assert tokens.shape == (0, 16)
    assert grids.shape == (0, 3)


def test_frames_are_merged_one_by_one() -> None:
    connector = build_connector(parse_connector("average(2) + linear"), 4, 8)
    video = torch.randn(3 * 4 * 2, 4)
    tokens, grid = connector(video, torch.tensor([[3, 4, 2]]))
    assert grid.tolist() == [[3, 2, 1]]
    frame, _ = connector(video[8:16], torch.tensor([[1, 4, 2]]))
    torch.testing.assert_close(tokens[2:4], frame)


def test_standardise_measures_then_centres() -> None:
    connector = build_connector(parse_connector("pixel_shuffle(2) + standardise + linear"), 4, 8)
    features, grid = torch.randn(64, 4) * 3 + 5, torch.tensor([[1, 8, 8]])
    before, _ = connector(features, grid)
    torch.testing.assert_close(before, connector.projection(connector.merge(features, [(1, 8, 8)])))  # identity so far
    connector.set_standardisation(*connector.measure(features, grid))
    merged = (connector.merge(features, [(1, 8, 8)]) - connector.mean) / connector.std
    torch.testing.assert_close(merged.mean(dim=0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.std(dim=0, correction=0), torch.ones(16), atol=1e-5, rtol=0)
    assert {"mean", "std"} <= set(connector.state_dict())


def test_standardise_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UsageError, match="does not standardise"):
        build_connector(parse_connector("linear"), 4, 8).set_standardisation(torch.zeros(4), torch.ones(4))
    with pytest.raises(UsageError, match="zero standard deviation"):
        build_connector(parse_connector("standardise + linear"), 4, 8).set_standardisation(
            torch.zeros(4), torch.zeros(4)
        )


def test_embedding_start_looks_like_text() -> None:
    connector = build_connector(parse_connector("linear"), 256, 32)
    embeddings = torch.randn(500, 32) * 0.3 + 1.0
    connector.start_from_embeddings(embeddings)
    tokens, _ = connector(torch.randn(400, 256), torch.tensor([[1, 20, 20]]))
    assert abs(tokens.mean().item() - embeddings.mean().item()) < 0.02
    assert abs(tokens.std().item() - embeddings.std().item()) < 0.03
