"""Imports flow downwards: a room never imports one that stands above it in the architecture."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "unclipped"

# Lowest first; rooms of one line may import each other.
LINES = [
    ["core"],
    ["encoders", "connectors", "attention", "images"],
    ["models", "data"],
    ["encoding"],
    ["objectives"],
    ["training", "evaluation", "inference", "compression"],
    ["studies", "audit", "serving"],
    ["cli", "recipes"],
]
LEVEL = {room: level for level, rooms in enumerate(LINES) for room in rooms}


def imports_of(path: Path) -> set[str]:
    """Rooms of the package that a file imports, anywhere in it (lazy imports count too)."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the absolute name"
            names = [node.module or ""]
            if node.module == "unclipped":
                names = [f"unclipped.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "unclipped" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_downwards(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1:  # the package's own entry files may reach every room
        return
    room = parts[0]
    assert room in LEVEL, f"room '{room}' is not in the order: add it where the architecture puts it"
    upward = {other for other in imports_of(path) if other in LEVEL and LEVEL[other] > LEVEL[room]}
    assert not upward, f"{room} imports {sorted(upward)}, which stand above it"


def test_every_room_is_ordered() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms <= set(LEVEL)
