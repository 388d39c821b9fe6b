"""Freezing a part, and counting parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.prompts import ask, batch
from support.tiny_models import tiny_vlm
from unclipped.core.errors import UsageError
from unclipped.models.freezing import PARTS, parameter_table, part_of, set_trainable


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return tiny_vlm(tmp_path, "dinov2", lm_overrides={"tie_word_embeddings": False})


def test_every_parameter_has_a_part(assembled: Any) -> None:
    names = {part_of(name) for name, _ in assembled.model.named_parameters()}
    assert names == set(PARTS)
    assert part_of("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight") == "text"
    assert part_of("module.model.connector.projection.0.weight") == "connector"
    assert part_of("lm_head.weight") == "text"
    with pytest.raises(UsageError, match="in none of the parts"):
        part_of("classifier.weight")


@pytest.mark.parametrize("parts", [("connector",), ("vision", "connector"), PARTS, ()])
def test_only_the_chosen_parts_change(model: Any, parts: tuple[str, ...]) -> None:
    net, processor, _ = model
    set_trainable(net, parts)
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    inputs = batch(processor, ask("what", (16, 16)))
    if parts:
        optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        net(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimiser.step()
    changed = {part_of(name) for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(parts)
    assert all((parameter.grad is None) for name, parameter in net.named_parameters() if part_of(name) not in parts)


def test_a_frozen_tower_stays_in_evaluation_mode(model: Any) -> None:
    net = model[0]
    net.train()
    assert net.model.vision_tower.training
    set_trainable(net, ["connector", "text"])
    assert not any(module.training for module in net.model.vision_tower.modules())
    net.train()
    assert not any(module.training for module in net.model.vision_tower.modules())
    assert net.model.language_model.training
    set_trainable(net, PARTS)
    assert net.model.vision_tower.training


def test_the_table_counts_shared_tensors_once(assembled: Any, model: Any) -> None:
    rows = {row["part"]: row for row in parameter_table(assembled.model)}
    assert rows["all"]["total"] == sum(parameter.numel() for parameter in assembled.model.parameters())
    net = model[0]
    set_trainable(net, ["connector"])
    rows = {row["part"]: row for row in parameter_table(net)}
    assert (
        rows["all"]["trainable"] == rows["connector"]["trainable"] == rows["connector"]["total"] == 2 * (32 * 32 + 32)
    )
    assert rows["text"]["trainable"] == rows["vision"]["trainable"] == 0


def test_an_unknown_part_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="unknown part 'conector'; did you mean 'connector'"):
        set_trainable(model[0], ["conector"])
