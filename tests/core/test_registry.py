"""Registries: files of a folder are found by themselves, and a broken one is never passed over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unclipped.core.errors import UsageError
from unclipped.core.registry import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "parts_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text("import builtins\nbuiltins.registry_of_a_test.register('one')(int)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


@pytest.fixture
def registry(package: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[type]:
    made: Registry[type] = Registry("part", package=package.name)
    monkeypatch.setattr("builtins.registry_of_a_test", made, raising=False)
    return made


def test_a_new_file_is_found(registry: Registry[type]) -> None:
    assert "one" in registry
    assert registry.get("one") is int
    assert registry.names() == ["one"]
    with pytest.raises(UsageError, match="unknown part 'tow'"):
        registry.get("tow")


def test_a_broken_file_is_an_error_at_every_look(registry: Registry[type], package: Path) -> None:
    (package / "two.py").write_text("raise RuntimeError('broken part')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken part"):
            registry.names()
