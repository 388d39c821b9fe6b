"""Modules of other packages are loaded one by one, and leave nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from support import oracles
from support.oracles import PINS, load_module, missing_packages, oracle


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """`odd.inner.wanted` imports a neighbour; no `__init__` of `odd` may run."""
    (tmp_path / "odd" / "inner").mkdir(parents=True)
    for folder in (tmp_path / "odd", tmp_path / "odd" / "inner"):
        (folder / "__init__.py").write_text("import torchvision_is_not_here\n")
    (tmp_path / "odd" / "inner" / "wanted.py").write_text("from odd.inner import other\n\nVALUE = other.VALUE + 1\n")
    (tmp_path / "odd" / "inner" / "other.py").write_text("VALUE = 1\n")
    return tmp_path


def test_a_module_comes_without_its_parents_code(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ModuleType("odd")
    monkeypatch.setitem(sys.modules, "odd", installed)
    path = list(sys.path)
    assert load_module(package, "odd.inner.wanted").VALUE == 2
    assert sys.modules["odd"] is installed
    assert [name for name in sys.modules if name.startswith("odd.")] == []
    assert sys.path == path


def test_another_version_is_missing(tmp_path: Path) -> None:
    pins = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    assert missing_packages(tmp_path) == pins
    name, version = pins[0].split("==")
    (tmp_path / f"{name}-{version}.dist-info").mkdir()
    (tmp_path / f"{pins[1].split('==')[0]}-0.1.dist-info").mkdir()
    assert missing_packages(tmp_path) == pins[1:]


def test_a_missing_package_skips_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles, "FOLDER", tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"lightly==\S+, .* not in .*: make test, or .*--target"):
        oracle("lightly.loss.koleo_loss")
