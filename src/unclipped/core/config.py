"""The base of every configuration: immutable, typed, and closed to unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenConfig(BaseModel):
    """Frozen pydantic model that refuses unknown fields; every recipe section derives from it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
