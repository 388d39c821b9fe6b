"""A name-to-object table whose misses suggest the nearest name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from unclipped.core.errors import UsageError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name. Everything registered goes through the contract suite of its kind."""

    def __init__(self, kind: str, *, package: str | None = None, attribute: str | None = None) -> None:
        """package: its modules are imported before the first look, so that a new file in it needs no other change.
        attribute: of the object, which takes the name."""
        self.kind, self.package, self.attribute = kind, package, attribute
        self._objects: dict[str, T] = {}
        self._is_complete = package is None

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under `name`. Raises UsageError when the name is taken."""

        def enter(item: T) -> T:
            if name in self._objects:
                raise UsageError(f"{self.kind} '{name}' is registered already; choose another name")
            if self.attribute is not None:
                setattr(item, self.attribute, name)
            self._objects[name] = item
            return item

        return enter

    def get(self, name: str) -> T:
        """The object under `name`. Raises UsageError that suggests the nearest valid name."""
        found = self._all().get(name)
        if found is None:
            raise UsageError(f"unknown {self.kind} '{name}'; {nearest(name, self._objects)}")
        return found

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._all())

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def _all(self) -> dict[str, T]:
        if not self._is_complete and self.package is not None:
            self._is_complete = True  # first, since a module may look itself
            try:
                package = importlib.import_module(self.package)
                for module in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{self.package}.{module.name}")
            except BaseException:
                self._is_complete = False  # the next look must not take a part for the whole
                raise
        return self._objects
