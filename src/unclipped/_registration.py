"""Registers the model classes with transformers the moment its Auto classes have been imported, and not before.

A finder on `sys.meta_path` finds nothing itself: it counts how deep the imports of transformers and of this package
are nested. When the outermost one ends and the Auto classes are loaded, every module that registration needs can be
imported without running into a half-made one; then it registers and takes itself away.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_MODULE = "transformers.models.auto.configuration_auto"
WATCHED = ("transformers", "unclipped")


class _Watcher(MetaPathFinder):
    def __init__(self) -> None:
        self.state = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self.watch(spec.loader)
                return spec
        return None

    def watch(self, loader: Any) -> None:
        """Count the execution of the module that this loader loads."""
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def counted(module: ModuleType) -> None:
            self.state.depth = getattr(self.state, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self.state.depth -= 1
            if self.state.depth == 0 and AUTO_MODULE in sys.modules:
                register_now()

        loader.exec_module = counted


_watcher = _Watcher()


def arrange() -> None:
    """Register now when the Auto classes are loaded already, else when they will have been."""
    if AUTO_MODULE in sys.modules:
        register_now()
    elif _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)


def register_now() -> None:
    """Register and stop watching."""
    if _watcher in sys.meta_path:
        sys.meta_path.remove(_watcher)
    from unclipped.models.register import register

    register()
