"""Encoders made of language models: positions, attention, stems, and strict transfer of weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_factories import DECODER, DECODERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    GlmConfig,
    GPT2Config,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.build import build_encoder, load_encoder
from unclipped.encoders.llm_config import LLMVisionConfig
from unclipped.encoders.llm_encoder import LLMEncoder, LLMVisionModel, register_llm_encoder
from unclipped.encoders.rotary import axial, grid_positions, penguin, two_axis_tables
from unclipped.encoders.stem import truncated_lecun_normal_
from unclipped.encoders.transfer import from_language_model
from unclipped.images.patches import patchify

GRID = torch.tensor([[1, 3, 4]])


@pytest.fixture(params=sorted(DECODERS))
def decoder(request: pytest.FixtureRequest) -> str:
    return request.param


def causal_lm(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(DECODERS[name]()).eval()


# ---- positions


def rotary_of(name: str) -> Any:
    model = AutoModel.from_config(DECODERS[name]())
    if name == "gemma3_text":
        return lambda x, positions: model.rotary_emb(x, positions, layer_type="full_attention")
    return model.rotary_emb


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


@pytest.mark.parametrize("form", ["axial", "penguin"])
def test_diagonal_positions_equal_the_decoders_own(decoder: str, form: str) -> None:
    rotary = rotary_of(decoder)
    line = torch.arange(7)[None]
    x = torch.zeros(1, 7, 32)
    for made, own in zip(two_axis_tables(rotary, x, line, line, form), rotary(x, line), strict=True):
        assert torch.equal(made, own)


@settings(max_examples=20, deadline=None)
@given(row=st.integers(0, 60), column=st.integers(0, 60), shift=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_axial_is_a_rotation_and_relative(row: int, column: int, shift: tuple[int, int]) -> None:
    rotary = rotary_of("qwen3")
    generator = torch.Generator().manual_seed(row * 61 + column)
    query, key = torch.randn(2, 16, generator=generator, dtype=torch.float64)

    def turned(vector: Tensor, r: int, c: int) -> Tensor:
        cos, sin = two_axis_tables(
            rotary, torch.zeros(1, 1, 32, dtype=torch.float64), torch.tensor([[r]]), torch.tensor([[c]]), "axial"
        )
        return rotate(vector, cos[0, 0], sin[0, 0])

    # float32 angles inside the decoder's table bound the agreement
    torch.testing.assert_close(turned(query, row, column).norm(), query.norm(), atol=1e-5, rtol=0)
    score = turned(query, row, column) @ turned(key, 3, 5)
    moved = turned(query, row + shift[0], column + shift[1]) @ turned(key, 3 + shift[0], 5 + shift[1])
    torch.testing.assert_close(score, moved, atol=1e-3, rtol=0)


def test_penguin_form_is_exact_and_no_rotation() -> None:
    """out[i] = q[i]·cos(row f) − q[i+d/2]·sin(row f); out[i+d/2] = q[i+d/2]·cos(col f) + q[i]·sin(col f)."""
    rotary, d = rotary_of("qwen3"), 16
    q = torch.randn(d)
    row, column = torch.tensor([[2]]), torch.tensor([[5]])
    cos, sin = (table[0, 0] for table in two_axis_tables(rotary, torch.zeros(1, 1, 32), row, column, "penguin"))
    frequency = 10000.0 ** (-2 * torch.arange(d // 2) / d)
    r, c = 2 * frequency, 5 * frequency
    expected = torch.cat((q[:8] * r.cos() - q[8:] * r.sin(), q[8:] * c.cos() + q[:8] * c.sin()))
    out = rotate(q, cos, sin)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert (out.norm() - q.norm()).abs() > 1e-3


def test_the_two_forms_take_the_axes_they_say() -> None:
    row, column = torch.zeros(8), torch.ones(8)
    assert penguin(row, column).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert axial(row, column).tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_grid_positions_are_row_major_and_shared_by_equal_grids() -> None:
    rows, columns = grid_positions([(2, 3), (3, 2)], torch.device("cpu"))
    assert rows.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]]
    assert columns.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1]]
    assert grid_positions([(2, 3)] * 4, torch.device("cpu"))[0].shape == (1, 6)


def test_rope_theta_reaches_every_rotary_table(decoder: str) -> None:
    own = LLMVisionModel(LLMVisionConfig(DECODERS[decoder](), patch_size=8))
    other = LLMVisionModel(LLMVisionConfig(DECODERS[decoder](), patch_size=8, rope_theta=123.0))
    x, line = torch.zeros(1, 4, 32), torch.arange(4)[None]
    for kind in own.layer_types or [None]:
        extra = {} if kind is None else {"layer_type": kind}
        before, after = (model.decoder.rotary_emb(x, line, **extra)[0] for model in (own, other))
        width = after.shape[-1]
        expected = torch.cos(3 * 123.0 ** (-2 * torch.arange(width // 2) / width))
        torch.testing.assert_close(after[0, 3, : width // 2], expected, atol=1e-5, rtol=0)
        assert not torch.equal(before, after)


# ---- attention


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_is_bidirectional_in_every_layer_and_without_window(decoder: str, attention: str) -> None:
    if decoder == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no sdpa attention for Gemma 2")
    register_llm_encoder()
    config = LLMVisionConfig(DECODERS[decoder](), patch_size=8)
    model = AutoModel.from_config(config, attn_implementation=attention).eval()
    assert model.decoder.config._attn_implementation == attention
    for module in model.modules():
        assert not getattr(module, "is_causal", False)
        assert getattr(module, "sliding_window", None) is None
    if decoder == "mistral":  # its attention reads the window from the configuration
        assert model.decoder.config.sliding_window is None
    patches = torch.randn(1, 12, 192)
    changed = patches.clone()
    changed[0, -1] += 1.0
    before, after = (model(values, [(1, 12)], output_hidden_states=True).hidden_states for values in (patches, changed))
    # One layer is enough for the first patch to see the last, far beyond the configured windows.
    assert (before[1][0, 0] - after[1][0, 0]).abs().max() > 0


@torch.no_grad()
def test_eager_and_sdpa_agree() -> None:
    config = LLMVisionConfig(DECODERS["qwen3"](), patch_size=8)
    register_llm_encoder()
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    patches = torch.randn(2, 6, 192)
    eager = model(patches, [(2, 3), (3, 2)]).last_hidden_state
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(patches, [(2, 3), (3, 2)]).last_hidden_state, eager, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_row_of_patches_equals_the_decoder_without_its_mask() -> None:
    """One row whose positions are put on the diagonal is the language model itself, all tokens visible to all."""
    lm = causal_lm("llama")
    model, _ = from_language_model(lm, patch_size=8)
    embedded = torch.randn(1, 5, 32)
    line = torch.arange(5)[None]
    hidden, tables = embedded, lm.model.rotary_emb(embedded, line)
    for layer in model.decoder.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=tables)
    visible = torch.zeros(1, 1, 5, 5)
    expected = lm.model(inputs_embeds=embedded, attention_mask=visible).last_hidden_state
    torch.testing.assert_close(model.decoder.norm(hidden), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: CohereConfig(**DECODER), "interleaved layout"),
        (lambda: GlmConfig(**DECODER, head_dim=8, pad_token_id=None), "half of the rotary tables"),
        (lambda: GPT2Config(n_embd=32, n_layer=1, n_head=2), "has no layers"),
    ],
)
def test_unfit_decoders_are_refused(config: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LLMVisionModel(LLMVisionConfig(config(), patch_size=8))


# ---- stems


def test_new_weights_are_truncated_lecun_normal() -> None:
    torch.manual_seed(0)
    model = LLMVisionModel(LLMVisionConfig(Qwen3Config(**{**DECODER, "hidden_size": 256}, head_dim=8), patch_size=14))
    weight = model.stem.projection.weight
    assert weight.shape == (256, 588)
    assert weight.std().item() == pytest.approx(588**-0.5, rel=0.02)
    assert weight.abs().max() <= 2 * 588**-0.5 / 0.8796 + 1e-6
    assert not model.stem.projection.bias.any()
    assert truncated_lecun_normal_(torch.empty(200, 100)).std().item() == pytest.approx(0.1, rel=0.05)


@torch.no_grad()
def test_convolution_stem_cuts_the_plane_that_two_convolutions_make() -> None:
    config = LLMVisionConfig(
        DECODERS["qwen3"](), patch_size=(32, 8), num_channels=1, stem="convolution", stem_channels=8
    )
    model = LLMVisionModel(config).eval()
    plane = torch.randn(1, 32, 40)
    features = model.stem(patchify(plane, (32, 8))[None], (1, 5))
    gelu = torch.nn.functional.gelu
    reduced = gelu(model.stem.second(gelu(model.stem.first(plane[None]))))
    assert reduced.shape == (1, 8, 8, 10)
    weight = model.stem.projection.weight.flatten(1)  # (hidden, 8·8·2)
    expected = torch.stack([weight @ reduced[0, :, :, 2 * i : 2 * i + 2].flatten() for i in range(5)])
    torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=0)


def test_convolution_stem_needs_patches_of_whole_quarters() -> None:
    with pytest.raises(UsageError, match="divisible by 4"):
        LLMVisionModel(LLMVisionConfig(DECODERS["qwen3"](), patch_size=(32, 6), stem="convolution"))


# ---- configuration


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_form": "axail"}, "did you mean 'axial'"),
        ({"stem": "convolutional"}, "did you mean 'convolution'"),
        ({"patch_size": (8, 8, 8)}, "patch_size"),
        ({"patch_size": 0}, "patch_size"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LLMVisionConfig(DECODERS["qwen3"](), **options)


def test_configuration_round_trip(decoder: str, tmp_path: Path) -> None:
    config = LLMVisionConfig(DECODERS[decoder](), patch_size=(4, 6), rope_form="penguin", rope_theta=77.0)
    config.save_pretrained(tmp_path)
    loaded = LLMVisionConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.patch_size == (4, 6)
    assert loaded.text_config.vocab_size == 1


def test_the_given_configuration_is_left_alone() -> None:
    given_config = DECODERS["mistral"]()
    before = given_config.to_dict()
    LLMVisionModel(LLMVisionConfig(given_config, patch_size=8, rope_theta=5.0))
    assert given_config.to_dict() == before


# ---- weights


def test_every_tensor_but_the_stem_comes_from_the_language_model(decoder: str, tmp_path: Path) -> None:
    lm = causal_lm(decoder)
    lm.save_pretrained(tmp_path)
    encoder, report = load_encoder(f"llm:{tmp_path}", patch_size=(4, 6))
    source = lm.base_model.state_dict()
    state = encoder.model.state_dict()
    assert not [name for name in state if "embed_tokens" in name or "lm_head" in name]
    for name, tensor in state.items():
        if name.startswith("decoder."):
            assert torch.equal(tensor, source[name.removeprefix("decoder.")])
    assert report.new == ("stem.projection.weight", "stem.projection.bias")
    assert set(report.taken) | {"embed_tokens.weight"} == set(source)
    assert "embed_tokens.weight" in report.dropped
    assert report.parameters["taken"] + report.parameters["new"] == sum(p.numel() for p in encoder.parameters())
    assert encoder.spec.objective == "llm_init"
    assert encoder.spec.mean == encoder.spec.std == (0.5, 0.5, 0.5)
    assert f"taken {len(report.taken)} tensors" in report.summary()


def test_a_model_in_memory_and_its_folder_give_the_same_encoder(tmp_path: Path) -> None:
    lm = causal_lm("qwen3")
    lm.save_pretrained(tmp_path)
    before = copy.deepcopy(lm.state_dict())
    from_memory, report = from_language_model(lm, patch_size=8)
    from_folder, _ = from_language_model(str(tmp_path), patch_size=8)
    assert report.dropped == ("model.embed_tokens.weight", "lm_head.weight")
    assert report.parameters["dropped"] == 2 * 96 * 32
    for name, tensor in from_memory.state_dict().items():
        if name.startswith("decoder."):
            assert torch.equal(tensor, from_folder.state_dict()[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    from_memory.decoder.norm.weight.data.zero_()
    assert lm.model.norm.weight.any()  # no storage is shared


@torch.no_grad()
def test_saved_encoder_loads_by_its_folder(decoder: str, tmp_path: Path) -> None:
    encoder = build_encoder(LLMVisionConfig(DECODERS[decoder](), patch_size=(4, 6))).eval()
    encoder.model.save_pretrained(tmp_path)
    loaded, report = load_encoder(str(tmp_path))
    assert report.dropped == report.new == ()
    patches = torch.randn(12, 72)
    assert torch.equal(loaded(patches, GRID), encoder(patches, GRID))


def test_a_broken_language_model_is_refused_with_all_its_faults(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    causal_lm("qwen3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3, 4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        load_encoder(f"llm:{tmp_path}", patch_size=8)
    message = str(error.value)
    assert str(tmp_path) in message
    assert "missing 1: norm.weight" in message
    assert "unexpected 1:" in message
    assert "layers.7.mlp.up_proj.weight" in message
    assert "misshaped 1: layers.0.mlp.up_proj.weight (found (3, 4), expected (64, 32))" in message


def test_a_decoder_with_a_tensor_that_has_no_place_is_refused() -> None:
    lm = Qwen3ForCausalLM(DECODERS["qwen3"]())
    lm.model.register_parameter("stray", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"unexpected 1: decoder\.stray"):
        from_language_model(lm, patch_size=8)


def test_reentrant_checkpointing_trains_a_frozen_stem() -> None:
    encoder = LLMEncoder(LLMVisionModel(LLMVisionConfig(DECODERS["qwen3"](), patch_size=8))).train()
    encoder.model.stem.requires_grad_(False)
    encoder.model.enable_input_require_grads()
    encoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    encoder(torch.randn(12, 192), GRID).sum().backward()
    assert encoder.model.decoder.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
