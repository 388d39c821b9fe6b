"""The `sparse:` section of recipes: how prefills are made sparse. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from unclipped.attention.pattern_file import is_pattern_file, read_pattern_file
from unclipped.core.config import BlockTokens, Decay, FrozenConfig, PatternText


class SparseConfig(FrozenConfig):
    """Sparse prefill, as `unclipped.sparse_prefill` takes it."""

    pattern: PatternText | Annotated[tuple[PatternText, ...], Field(min_length=1, max_length=1024)]
    """A pattern such as `global_text + sink(128) + topk(16)`, a list of one for each layer, or a pattern file
    (`pattern.yaml`), whose pattern and blocks take its place."""
    fallback: Literal["auto", "never"] = "auto"
    """`auto`: dense where sparse does not pay (short prompts, dense plans). `never`: the pattern at any length."""
    calibration: Literal["measured", "fixed"] = "measured"
    """Rule of `auto`: measured on this machine's CPU once, or fixed (4,096 tokens, density 0.5), as training has it."""
    key_block: BlockTokens = 128
    """Keys in a block; listed blocks are attended to whole."""
    query_block: BlockTokens = 256
    """Queries that share a list of key blocks; a multiple of `key_block`."""

    def __init__(self, **fields: Any) -> None:
        """A file is read at once, so that a recorded recipe holds the pattern itself. Raises DataError about it."""
        pattern = fields.get("pattern")
        if isinstance(pattern, str) and is_pattern_file(pattern):
            held = read_pattern_file(pattern)
            fields = {"key_block": held.key_block, "query_block": held.query_block, **fields, "pattern": held.pattern}
        super().__init__(**fields)

    @model_validator(mode="after")
    def _blocks_divide(self) -> SparseConfig:
        if self.query_block % self.key_block:
            raise ValueError(f"query_block ({self.query_block}) must be a multiple of key_block ({self.key_block})")
        return self


class SparseTrainingConfig(SparseConfig):
    """Training under a pattern: forward and backward attend as the prefill later will."""

    dense_share: Decay = 0.0
    """Share of the steps that run dense, drawn by the seed, so that dense prefills and decode stay good."""
