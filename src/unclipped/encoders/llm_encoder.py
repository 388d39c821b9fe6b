"""A decoder language model as a vision encoder: bidirectional inside each image, two-dimensional rotary positions.

The decoder's layers, its own norms and its rotary frequencies stay; its token embedding and head are gone; a linear
map (or a small convolutional stem) of the patches takes the embedding's place. The form follows Penguin-VL
(arXiv 2603.06569), for any decoder of transformers that has `layers`, `norm` and `rotary_emb`.

Gemma multiplies token embeddings by √hidden. That scaling belongs to the embedding of tokens and goes with it: the
stem learns its own scale.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from unclipped.core.errors import UsageError, first_line
from unclipped.encoders.base import ENCODERS, HALF, VisionEncoder
from unclipped.encoders.grouping import Grid
from unclipped.encoders.llm_config import LLMVisionConfig
from unclipped.encoders.rotary import CosSin, check_half_split, grid_positions, two_axis_tables
from unclipped.encoders.spec import Objective
from unclipped.encoders.stem import build_stem, initialise_stem

REMEDY = "choose a decoder of the Qwen, Llama, SmolLM, Gemma or Mistral kind"


class LLMVisionModel(PreTrainedModel):
    """Decoder layers over patches. State dict: `stem.*`, `decoder.layers.*`, `decoder.norm.*`."""

    config_class = LLMVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment] - a tuple in transformers' own models too
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: LLMVisionConfig) -> None:
        super().__init__(config)
        decoder: Any = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        name = config.text_config.model_type
        lacking = [part for part in ("layers", "norm", "rotary_emb") if not hasattr(decoder, part)]
        if lacking:
            raise UsageError(
                f"decoder '{name}' has no {', '.join(lacking)}, so it cannot become a vision encoder; {REMEDY}"
            )
        # transformers asks every model for its input embeddings, so a module without parameters takes their place. It
        # has a name of its own: adapters find modules by the end of their name, and mean the language model's.
        embedding = decoder.get_input_embeddings()
        delattr(decoder, next(child for child, module in decoder.named_children() if module is embedding))
        decoder._input_embed_layer = "no_token_embedding"
        decoder.no_token_embedding = nn.Identity()
        self.decoder: Any = decoder
        self.stem: Any = build_stem(
            config.stem, config.num_channels, config.patch_size, config.hidden_size, config.stem_channels
        )
        self.layer_types = self._rotary_layer_types(name)
        make_bidirectional(decoder, name)
        self.post_init()
        if self.stem.projection.weight.device.type != "meta":  # tables can be compared only where they have values
            self._check_rotary(name)

    def get_input_embeddings(self) -> nn.Module:
        return self.stem

    def _init_weights(self, module: nn.Module) -> None:
        # The decoder is a PreTrainedModel and initialises itself, so only the stem arrives here.
        initialise_stem(module)

    def _rotary_layer_types(self, name: str) -> list[str] | None:
        """Kind of each layer when the decoder has rotary tables per kind (Gemma 3), else None."""
        if "layer_type" not in inspect.signature(self.decoder.rotary_emb.forward).parameters:
            return None
        layer_types = getattr(self.config.text_config, "layer_types", None)
        if not layer_types:
            raise UsageError(f"decoder '{name}' has rotary tables per kind of layer but names no layer_types")
        return list(layer_types)

    def _tables(self, x: Tensor, rows: Tensor, columns: Tensor) -> list[CosSin]:
        """cos and sin (1 or B, n, d) for each layer, for patches at rows and columns (1 or B, n)."""
        kinds = self.layer_types or [None] * len(self.decoder.layers)

        def tables_of(kind: str | None) -> CosSin:
            extra = {} if kind is None else {"layer_type": kind}
            return two_axis_tables(
                lambda states, positions: self.decoder.rotary_emb(states, positions, **extra),
                x,
                rows,
                columns,
                self.config.rope_form,
            )

        by_kind = {kind: tables_of(kind) for kind in dict.fromkeys(kinds)}
        return [by_kind[kind] for kind in kinds]

    def _check_rotary(self, name: str) -> None:
        """Refuse decoders whose rotary layout the two-axis tables would silently break."""
        for kind in dict.fromkeys(self.layer_types or [None]):
            extra = {} if kind is None else {"layer_type": kind}
            check_half_split(
                lambda states, positions, extra=extra: self.decoder.rotary_emb(states, positions, **extra),
                self.config.hidden_size,
                f"decoder '{name}'",
            )
        try:
            matters = self._second_half_matters()
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise UsageError(
                f"decoder '{name}': its layers ask for more than hidden states and rotary positions "
                f"({first_line(error)}); {REMEDY}"
            ) from None
        if not matters:
            raise UsageError(
                f"decoder '{name}': its attention reads only half of the rotary tables or none of them, so rows and "
                f"columns cannot both be told to it; {REMEDY}"
            )

    @torch.no_grad()
    def _second_half_matters(self) -> bool:
        """True when some layer's output changes with the second half of cos and sin."""
        weight = self.stem.projection.weight
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, 2, self.config.hidden_size, generator=generator).to(weight)
        was_training = self.training
        self.eval()
        try:
            tables = self._tables(states, *grid_positions([(1, 2)], states.device))
            for layer, (cos, sin) in zip(self.decoder.layers, tables, strict=True):
                half = cos.shape[-1] // 2
                other_cos, other_sin = cos.clone(), sin.clone()
                other_cos[..., half:], other_sin[..., half:] = sin[..., half:], cos[..., half:]
                first = run_layer(layer, states, (cos, sin))
                if not torch.equal(first, run_layer(layer, states, (other_cos, other_sin))):
                    return True
        finally:
            self.train(was_training)
        return False

    def forward(
        self,
        pixel_values: Tensor,
        grids: Sequence[Grid],
        output_hidden_states: bool = False,
        keep: Tensor | None = None,
        **attention: Any,
    ) -> BaseModelOutput:
        """Encode images of one common number of patches (and, for the convolution stem, one common grid).

        pixel_values (B, n, channels·ph·pw), patches row-major; grids: B pairs (rows, columns). Returns
        `last_hidden_state` (B, n, hidden) after the decoder's final norm and, on request, `hidden_states`: the stem's
        output and the output of each layer, before that norm. Each image attends to itself only.

        attention: arguments for the attention of every layer. With `keep` (B, k), pixel_values (B, k, …) are only the
        patches at these places of images of one grid. Raises UsageError then for the convolution stem, which reads
        patches across their borders.
        """
        rows, columns = grid_positions(grids, pixel_values.device)  # (1 or B, n)
        if keep is not None:
            if self.config.stem != "linear":
                raise UsageError(
                    f"stem '{self.config.stem}': chosen patches need the stem 'linear', which sees one patch"
                )
            rows, columns = rows[0][keep], columns[0][keep]  # (B, k)
        hidden = self.stem(pixel_values, grids[0])  # (B, n or k, hidden)
        states = [hidden] if output_hidden_states else None
        for layer, tables in zip(self.decoder.layers, self._tables(hidden, rows, columns), strict=True):
            hidden = run_layer(layer, hidden, tables, **attention)
            if states is not None:
                states.append(hidden)
        return BaseModelOutput(
            last_hidden_state=self.decoder.norm(hidden), hidden_states=tuple(states) if states is not None else None
        )


def run_layer(layer: nn.Module, hidden: Tensor, tables: CosSin, **attention: Any) -> Tensor:
    """One decoder layer without mask and cache: (B, n, hidden) → (B, n, hidden)."""
    # The states go first and unnamed: that is what gradient checkpointing needs.
    output = layer(hidden, attention_mask=None, position_embeddings=tables, **attention)
    return output[0] if isinstance(output, tuple) else output


def make_bidirectional(decoder: Any, name: str) -> None:
    """Switch off causality and sliding windows in every attention module. Raises UsageError when one cannot be found.

    Without a mask the attention backends fall back on the module's `is_causal`, which decoders set.
    """
    attentions: list[Any] = [module for module in decoder.modules() if hasattr(module, "is_causal")]
    if len(attentions) < len(decoder.layers):
        raise UsageError(f"decoder '{name}': not every layer has attention that can be made bidirectional; {REMEDY}")
    for attention in attentions:
        attention.is_causal = False
        if hasattr(attention, "sliding_window"):
            attention.sliding_window = None
        elif getattr(decoder.config, "sliding_window", None) is not None:  # Mistral's attention reads it there
            decoder.config.sliding_window = None


@ENCODERS.register("unclipped_llm_encoder")
class LLMEncoder(VisionEncoder):
    """Native-resolution encoder made of a language model."""

    family: ClassVar[str] = "unclipped_llm_encoder"
    objective: ClassVar[Objective] = "llm_init"
    default_mean, default_std = HALF, HALF

    @classmethod
    def build_model(cls, config: Any) -> PreTrainedModel:
        register_llm_encoder()
        return super().build_model(config)

    @classmethod
    def native_image_size(cls, config: Any) -> None:
        return None

    def group_key(self, grid: Grid) -> Hashable:
        # A linear stem sees patches one by one and positions go in per image: equal token counts share a batch.
        return grid if self.model.config.stem == "convolution" else grid[0] * grid[1]

    def run(self, patches: Tensor, grids: list[Grid], output_hidden_states: bool) -> Any:
        return self.model(patches, grids, output_hidden_states=output_hidden_states, **self.attention_arguments(grids))

    def run_chosen(self, patches: Tensor, keep: Tensor, grid: Grid) -> Tensor:
        return self.model(patches, [grid], keep=keep).last_hidden_state


def register_llm_encoder() -> None:
    """Make AutoConfig and AutoModel know `unclipped_llm_encoder`; may be called any number of times."""
    AutoConfig.register(LLMVisionConfig.model_type, LLMVisionConfig, exist_ok=True)
    AutoModel.register(LLMVisionConfig, LLMVisionModel, exist_ok=True)
