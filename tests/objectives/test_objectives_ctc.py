"""The auxiliary CTC loss against an enumeration of alignments; which rows it takes; the objective around it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tiny_models import tiny_vlm
from unclipped.core.errors import DataError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.mixture import Mixture
from unclipped.objectives.answer import AnswerObjective
from unclipped.objectives.ctc import CTCHead, Reading, answer_tokens, needed_frames
from unclipped.training.examples import MixtureExamples


def head(hidden: int = 6, vocabulary: int = 4) -> CTCHead:
    torch.manual_seed(0)
    return CTCHead(hidden, vocabulary, special=frozenset({0}), image_token_id=3)


def collapse(path: tuple[int, ...], blank: int) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label != blank]


def test_loss_sums_the_probability_of_all_alignments() -> None:
    ctc = head()
    grid = torch.tensor([[1, 1, 3], [1, 2, 2]])
    features = torch.randn(7, 6, dtype=torch.float32)
    readings = [Reading(0, [1]), Reading(1, [2, 2])]
    expected = torch.tensor(0.0)
    for reading, piece in zip(readings, features.split([3, 4]), strict=True):
        probabilities = ctc.classes(piece).softmax(-1)
        paths = itertools.product(range(5), repeat=len(piece))
        total = sum(
            torch.stack([probabilities[t, label] for t, label in enumerate(path)]).prod()
            for path in paths
            if collapse(path, 4) == reading.target
        )
        expected = expected - torch.log(total) / len(reading.target)
    torch.testing.assert_close(ctc(features, grid, readings), expected)


def test_gradients_are_those_of_finite_differences() -> None:
    ctc = head().double()
    features = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    grid = torch.tensor([[1, 1, 4]])

    def loss(x: torch.Tensor) -> torch.Tensor:
        scores = ctc.classes(x)[:, None].log_softmax(-1)
        return torch.nn.functional.ctc_loss(scores, torch.tensor([1, 2]), [4], [2], blank=4, reduction="sum") / 2

    assert torch.autograd.gradcheck(loss, (features,))
    torch.testing.assert_close(ctc(features, grid, [Reading(0, [1, 2])]).double(), loss(features), atol=1e-5, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(target=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_needed_frames_is_the_shortest_path_that_spells_the_answer(target: list[int]) -> None:
    shortest = (
        next(
            n
            for n in range(1, 9)
            if n >= len(target) and any(collapse(p, 3) == target for p in itertools.product(range(4), repeat=n))
        )
        if len(target) <= 3
        else needed_frames(target)
    )
    assert needed_frames(target) == shortest


def test_answers_of_a_row() -> None:
    special = frozenset({0, 9})
    assert answer_tokens([-100, -100, 4, 5, 9, -100], None, special) == [4, 5]
    assert answer_tokens([-100, 4, 9, -100, 5, 9], None, special) is None  # two answers
    assert answer_tokens([-100, -100, 4, 9, -100], [0, 1, 2, 3, 0], special) == [4]  # padding may restart
    assert answer_tokens([-100, -100, 4, 9], [0, 1, 1, 2], special) is None  # question blocks behind one image
    assert answer_tokens([-100, -100], None, special) is None


def test_rows_without_one_image_and_a_fitting_answer_are_left_out() -> None:
    image = 3
    ids = torch.tensor([[image, image, 1, 1], [image, image, 1, 1], [1, 1, 1, 1], [image, image, 1, 1]])
    labels = torch.tensor([[-100, -100, 1, 0], [-100, 1, 1, 2], [-100, -100, 1, 0], [-100, -100, 0, 0]])
    grid = torch.tensor([[1, 1, 2], [1, 1, 2], [1, 1, 2]])
    found, rows = head().readings(ids, labels, None, grid, [2, 2, 2])
    assert rows == 3
    assert found == [Reading(0, [1])]  # "1 1 2" needs four frames, the last row answers with special tokens only
    several, rows = head().readings(ids[:1].repeat(1, 2), torch.tensor([[-100] * 6 + [1, 0]]), None, grid[:2], [2, 2])
    assert (several, rows) == ([], 1)
    assert head().readings(ids[2:3], labels[2:3], None, None, []) == ([], 0)


def test_data_that_never_fits_is_an_error() -> None:
    ctc = head()
    ctc.note(500, 0)
    with pytest.raises(DataError, match="none of the first 520 rows"):
        ctc.note(20, 0)
    other = head()
    other.note(500, 1)
    other.note(500, 0)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, processor, _ = tiny_vlm(tmp_path_factory.mktemp("ctc"))
    return model, processor


def batch_of(processor: Any, source: str = "generated:characters", **data: Any) -> dict[str, Any]:
    config = DataConfig(sources=(SourceConfig(source=source),), **data)
    return MixtureExamples(Mixture(config, 0), processor).batch(range(4))


def objective(model: Any, weight: float = 0.3) -> AnswerObjective:
    torch.manual_seed(1)
    special = frozenset({0, 1})
    ctc = CTCHead(model.model.vision_tower.spec.hidden_size, model.lm_head.weight.shape[0], special=special,
                  image_token_id=model.config.image_token_id)  # fmt: skip
    return AnswerObjective(model, auxiliary={"ctc": weight}, ctc_head=ctc)


def test_answer_loss_equals_the_models_own(vlm: Any) -> None:
    model, processor = vlm
    batch = batch_of(processor)
    inputs = {key: value for key, value in batch.items() if key != "sample_ids"}
    plain = AnswerObjective(model)(**inputs)
    torch.testing.assert_close(plain["loss"], model(**inputs).loss)
    with_ctc = objective(model)(**inputs)
    torch.testing.assert_close(with_ctc["parts"]["answer"], plain["parts"]["answer"])
    expected = with_ctc["parts"]["answer"] + 0.3 * with_ctc["parts"]["ctc"]
    torch.testing.assert_close(with_ctc["loss"].detach(), expected)
    assert with_ctc["parts"]["ctc_left_out"] == 0


def test_ctc_reaches_the_encoder_but_not_the_decoder(vlm: Any) -> None:
    model, processor = vlm
    wrapped = objective(model)
    inputs = {key: value for key, value in batch_of(processor).items() if key != "sample_ids"}
    outputs = wrapped(**inputs)
    (outputs["loss"] - AnswerObjective(model)(**inputs)["loss"]).backward()
    with_gradient = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-5}
    assert "ctc_head.classes.weight" in with_gradient
    assert any("vision_tower" in name for name in with_gradient)
    assert not any("language_model" in name for name in with_gradient)
    wrapped.zero_grad()


def test_counts_of_parts_of_a_batch_add_up(vlm: Any, tmp_path: Path) -> None:
    """Losses of two halves, each divided by the counts of the whole, sum to the loss of the whole."""
    model, processor = vlm
    wrapped = objective(model)
    config = DataConfig(sources=(SourceConfig(source="generated:characters"),))
    examples = MixtureExamples(Mixture(config, 0), processor)
    batches = [examples.batch(range(4)), examples.batch(range(1)), examples.batch(range(1, 4))]
    whole, *halves = [{k: v for k, v in batch.items() if k != "sample_ids"} for batch in batches]
    counts = [wrapped.count(half) for half in halves]
    total = {name: counts[0][name] + counts[1][name] for name in counts[0]}
    assert total == wrapped.count(whole)
    summed = sum(wrapped(counts=total, **half)["loss"] for half in halves)
    torch.testing.assert_close(summed, wrapped(**whole)["loss"])


def test_a_batch_without_images_has_a_ctc_part_of_zero(vlm: Any) -> None:
    model, processor = vlm
    inputs = {key: value for key, value in batch_of(processor, blind="removed").items() if key != "sample_ids"}
    outputs = objective(model)(**inputs)
    assert outputs["parts"]["ctc"] == outputs["parts"]["ctc_left_out"] == 0
    assert outputs["loss"] == outputs["parts"]["answer"]


def test_parts_of_parameters(vlm: Any) -> None:
    wrapped = objective(vlm[0])
    parts = {
        name.split(".")[0] if name.startswith("ctc") else "": wrapped.part_of(name)
        for name, _ in wrapped.named_parameters()
    }
    assert parts["ctc_head"] == "vision"
    assert {wrapped.part_of(name) for name, _ in wrapped.named_parameters()} == {"vision", "connector", "text"}
