"""A name-to-object table whose misses suggest the nearest name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from unclipped.core.errors import UsageError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name. Everything registered goes through the contract suite of its kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._objects: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under `name`. Raises UsageError when the name is taken."""

        def enter(item: T) -> T:
            if name in self._objects:
                raise UsageError(f"{self.kind} '{name}' is registered already; choose another name")
            self._objects[name] = item
            return item

        return enter

    def get(self, name: str) -> T:
        """The object under `name`. Raises UsageError that suggests the nearest valid name."""
        try:
            return self._objects[name]
        except KeyError:
            raise UsageError(f"unknown {self.kind} '{name}'; {nearest(name, self._objects)}") from None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._objects)

    def __contains__(self, name: object) -> bool:
        return name in self._objects
