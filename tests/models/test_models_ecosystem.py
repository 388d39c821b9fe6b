"""Other people's tools on an assembled model: PEFT, TRL, accelerate, tensor parallelism, compilation and export."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.prompts import ask, batch
from support.tiny_models import tiny_image, tiny_text_config, tiny_vision_config, tiny_vlm
from unclipped.connectors.build import build_connector
from unclipped.connectors.config import parse_connector
from unclipped.encoders.build import build_encoder
from unclipped.encoders.vit_mae_init import sine_cosine_table
from unclipped.models.configuration import UnclippedConfig
from unclipped.models.modeling import UnclippedModel


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


def stock_llava() -> Any:
    """A tiny LLaVA with a tied output layer: what transformers' own model does is what ours has to do."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = AutoConfig.for_model(
        "clip_vision_model", hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    text = tiny_text_config("qwen3")
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=5, tie_word_embeddings=True)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [7, 8]},
        {"trainable_token_indices": {"embed_tokens": [7]}},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_adapters_of_a_tied_embedding_train_as_on_a_stock_llava(tmp_path: Path, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model, processor, _ = tiny_vlm(tmp_path, "llm")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    inputs = batch(processor, ask("what", (16, 16)))
    inputs["input_ids"][:, -1] = 7
    trained: list[set[str]] = []
    for base, given in ((stock_llava(), {"input_ids": torch.tensor([[7, 8, 9, 10]])}), (model, inputs)):
        adapter = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM", **options)
        adapted = peft.get_peft_model(base, adapter)
        adapted(**given, labels=given["input_ids"]).loss.backward()
        trained.append(
            {
                name
                for name, parameter in adapted.named_parameters()
                if "lora" not in name and parameter.grad is not None and parameter.grad.any()
            }
        )
        with torch.no_grad():
            expected = adapted.eval()(**given).logits
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(**given).logits, expected, atol=1e-5, rtol=1e-4)
    assert trained[0] == trained[1] != set()


TENSOR_PARALLEL = """
import sys, torch
from transformers import AutoModelForImageTextToText
from unclipped.models.register import register
register()
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], tp_plan="auto")
kept = torch.load(sys.argv[1] + "/kept.pt")
with torch.no_grad():
    logits = model(**kept["inputs"]).logits
assert type(model.lm_head.weight).__name__ == "DTensor"
torch.testing.assert_close(logits, kept["logits"], atol=1e-5, rtol=1e-4)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_tied_model_loads_tensor_parallel(tmp_path: Path) -> None:
    """Two processes, each with half of the vocabulary and of the language model's layers, give the logits of one."""
    model, processor, _ = tiny_vlm(tmp_path, "llm", output=tmp_path / "out")
    inputs = batch(processor, ask("what", (16, 16)))
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": model(**inputs).logits}, tmp_path / "out" / "kept.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-W", "ignore", "-c", TENSOR_PARALLEL, str(tmp_path / "out")]
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


@pytest.mark.parametrize("vision", ["llm", "dinov2", "vit_mae"])
def test_a_device_map_cuts_no_layer_and_no_connector(tmp_path: Path, vision: str) -> None:
    """Over two devices of any size, each layer of the tower and of the language model lies on one of them."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    model, _, _ = tiny_vlm(tmp_path, vision, connector="pixel_shuffle(2x2) + standardise + mlp(2)")
    undivided = [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Layer", "Embeddings", "Connector"))
    ]
    assert len([name for name in undivided if "vision_tower" in name]) >= 2
    total = compute_module_sizes(model)[""]
    for tenths in range(2, 10):
        budget = {0: total * tenths // 10, "cpu": 10 * total}
        placed = infer_auto_device_map(model, max_memory=budget, no_split_module_classes=list(model._no_split_modules))
        cut = [name for name in undivided if any(key.startswith(f"{name}.") for key in placed)]
        assert not cut, f"{tenths}/10 of the model on the first device"


def test_a_masked_autoencoder_built_without_memory_starts_whole() -> None:
    """On the meta device a model has no values; the initialisation that follows writes each of them."""
    config = UnclippedConfig(tiny_vision_config("vit_mae", image_size=32), tiny_text_config("qwen3"))
    with torch.device("meta"):
        model = UnclippedModel(config)
        tower = build_encoder(tiny_vision_config("vit_mae", image_size=32))
    for module, start in ((model, model.init_weights), (tower, tower.model.init_weights)):
        module.to_empty(device="cpu")
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data.fill_(torch.nan)  # what memory holds that nobody wrote
        start()
        encoder = getattr(module, "vision_tower", module)
        embeddings = encoder.model.embeddings
        for name, tensor in encoder.state_dict().items():
            assert tensor.isfinite().all(), name
        torch.testing.assert_close(embeddings.position_embeddings[0, 1:], sine_cosine_table(4, 4, 32))
        assert not embeddings.position_embeddings[0, 0].any()
        assert 0.005 < embeddings.cls_token.std() < 0.05


GRIDS = ((1, 2, 2), (1, 2, 4), (2, 2, 2))


@pytest.mark.parametrize("family", ["llm", "vit_mae"])
def test_a_tower_compiles_and_exports_whole_for_given_grids(tmp_path: Path, family: str) -> None:
    """Grids as Python integers are constants of the graph; images of unlike grids are in it."""
    if family == "llm":
        tower = tiny_vlm(tmp_path, "llm")[0].model.vision_tower
    else:
        tower = build_encoder(tiny_vision_config(family)).eval()
    pixels = torch.randn(20, 192)
    with torch.no_grad():
        expected = tower(pixels, torch.tensor(GRIDS))
        assert torch.equal(torch.compile(tower, fullgraph=True, backend="eager")(pixels, GRIDS), expected)
        exported = torch.export.export(tower, (pixels, GRIDS)).module()
        assert torch.equal(exported(pixels, GRIDS), expected)


@pytest.mark.parametrize("text", ["pixel_shuffle(2x2) + standardise + mlp", "resample(2x3) + linear"])
def test_a_connector_compiles_and_exports_whole_for_given_grids(text: str) -> None:
    connector = build_connector(parse_connector(text), 8, 16)
    features = torch.randn(20, 8)
    with torch.no_grad():
        tokens, grids = connector(features, torch.tensor(GRIDS))
        for run in (
            torch.compile(connector, fullgraph=True, backend="eager"),
            torch.export.export(connector, (features, GRIDS)).module(),
        ):
            found, found_grids = run(features, GRIDS)
            assert torch.equal(found, tokens)
            assert torch.equal(found_grids, grids)
