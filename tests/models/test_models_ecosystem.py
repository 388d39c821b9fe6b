"""Other people's trainers and adapters on an assembled model: PEFT, TRL, torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.prompts import ask, batch
from support.tiny_models import tiny_image, tiny_vlm


@pytest.fixture
def vlm(tmp_path: Path) -> Any:
    return tiny_vlm(tmp_path, "llm", lm_overrides={"tie_word_embeddings": False})


def test_lora_trains_generates_and_merges(vlm: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, processor, _ = vlm
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = r".*language_model.*\.(q_proj|v_proj)"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    inputs = batch(processor, ask("what", (16, 16)), ask("how many", (24, 16)), side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(**inputs, labels=labels, supervised_only=True).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    prompt = batch(processor, ask("what", (16, 16)))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = adapted.generate(**prompt, **options)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(**prompt, **options), expected)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed
    assert all("language_model" in name and name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)


def test_sft_trainer_with_images(vlm: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, processor, _ = vlm
    rows = [
        {
            "images": [tiny_image(16, 16 + 8 * index)],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
        }
        for index, answer in enumerate(["a red circle", "a blue square", "green", "two"])
    ]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=processor,
        train_dataset=Dataset.from_list(rows),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=True,
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    for part in ("vision_tower", "connector", "language_model"):
        assert any(
            not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if part in name
        ), part


def test_the_language_side_compiles_whole(vlm: Any) -> None:
    """One graph without breaks over a step of decoding; the `eager` backend needs no compiler."""
    model, processor, _ = vlm
    inputs = batch(processor, ask("what is this"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)
