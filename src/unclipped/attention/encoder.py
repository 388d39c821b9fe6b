"""Vision encoders under a pattern: the same plans as sparse prefill, with every token allowed to see every other.

Class and register tokens see all patches and all patches see them; the pattern says which patches see which. Unlike a
prefill's, an encoder's pattern is part of the model: it holds at every size and has no dense fallback, because features
of an encoder that was trained under windows are those under windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from unclipped.attention.layout import Layout
from unclipped.attention.parts import check_lists
from unclipped.attention.patterns import GlobalText, Pattern
from unclipped.attention.plan import BlockPlan, build_plan
from unclipped.attention.sparse import sparse_attention
from unclipped.attention.syntax import parse_pattern
from unclipped.core.errors import UsageError

NAME = "unclipped_sparse_encoder"
ARGUMENT = "encoder_view"
_MOST_PLANS = 64


class EncoderPattern:
    """A pattern for the layers of one encoder.

    Raises UsageError for text that is no pattern and for lists longer than the encoder has layers or key heads.
    """

    def __init__(
        self,
        pattern: str | Pattern,
        *,
        prefix: int,
        layers: int,
        key_heads: int,
        key_block: int = 128,
        query_block: int = 256,
        backend: str | None = None,
    ) -> None:
        """prefix: class and register tokens before the patches. Blocks in tokens, as `build_plan` takes them."""
        self.given = parse_pattern(pattern) if isinstance(pattern, str) else pattern
        check_lists(self.given, layers=layers, key_heads=key_heads)
        self.pattern = GlobalText() + self.given if prefix else self.given
        self.prefix, self.backend = prefix, backend
        self.key_block, self.query_block = key_block, query_block
        self.density: dict[int, float] = {}
        """Attended pairs over all pairs in each layer at its last forward, mean over the batch."""
        self._plans: dict[tuple[Layout, Pattern], BlockPlan] = {}
        self._layers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Copies of an encoder (a teacher) number their own layers."""
        return {**self.__dict__, "_layers": None, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _layers=WeakKeyDictionary())

    def view(self, grids: Sequence[tuple[int, int]]) -> EncoderView:
        """What the layers of one forward are handed: images of these grids (rows, columns) in patches."""
        return EncoderView(self, tuple(Layout.of_encoder(self.prefix, grid) for grid in grids))

    def layer_of(self, attention: nn.Module) -> int:
        """The number of the layer that an attention module belongs to: they first run in order."""
        return self._layers.setdefault(attention, len(self._layers))

    def plan(self, layer: int, layout: Layout, query: Tensor, key: Tensor, scale: float) -> BlockPlan:
        """The plan of one image, of query (H, N, d) and key (Hkv, N, d); static ones are kept."""
        pattern = self.pattern.for_layer(layer)
        blocks: dict[str, Any] = {"key_block": self.key_block, "query_block": self.query_block}
        if pattern.is_dynamic:
            with torch.no_grad():
                return build_plan(pattern, layout, **blocks, query=query, key=key, scale=scale)
        if (layout, pattern) not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[layout, pattern] = build_plan(pattern, layout, **blocks, key_heads=key.shape[0])
        return self._plans[layout, pattern]


@dataclass(frozen=True, eq=False)
class EncoderView:
    """The pattern and the layouts of a batch. It travels as an argument of the layers, so that recomputation under
    gradient checkpointing sees the batch's own."""

    pattern: EncoderPattern
    layouts: tuple[Layout, ...]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query (B, H, N, d), key and value (B, Hkv, N, d) → (B, H, N, d). One layout serves all rows, or each has one.

        Raises UsageError when the layouts do not fit the tokens.
        """
        layouts = self.layouts * len(query) if len(self.layouts) == 1 else self.layouts
        if len(layouts) != len(query) or any(layout.length != query.shape[2] for layout in layouts):
            raise UsageError(
                f"encoder pattern: {type(module).__name__} has {len(query)} rows of {query.shape[2]} tokens, the "
                f"layouts are {[layout.length for layout in layouts]}; are all patches of the images there?"
            )
        layer, densities, pieces = self.pattern.layer_of(module), [], []
        for row, layout in enumerate(layouts):
            plan = self.pattern.plan(layer, layout, query[row], key[row], scale)
            one = slice(row, row + 1)
            pieces.append(
                sparse_attention(query[one], key[one], value[one], plan, scale=scale, backend=self.pattern.backend)
            )
            densities.append(plan.density)
        self.pattern.density[layer] = sum(densities) / len(densities)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def encoder_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    encoder_view: EncoderView | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function: query (B, H, N, d), key and value (B, Hkv, N, d) → (B, N, H, d). Dense without a view.

    Raises UsageError for attention dropout, masks and score changes, which plans do not know.
    """
    if encoder_view is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    changes = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    changes += ["attention dropout"] * (dropout > 0) + ["an attention mask"] * (attention_mask is not None)
    if changes:
        raise UsageError(
            f"encoder pattern: {type(module).__name__} uses {', '.join(changes)}, which block plans do not compute; "
            "set it to none in the encoder's configuration, or leave the pattern out"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return encoder_view.attend(module, query, key, value, scale).transpose(1, 2).contiguous(), None


def register() -> None:
    """Enter the function in both interfaces of transformers; may be called any number of times."""
    AttentionInterface.register(NAME, encoder_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
