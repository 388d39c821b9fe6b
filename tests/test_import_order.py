"""Order of the source: imports flow downwards and in no circle, images have one door, files stay short.

Known exceptions are listed with the rule that they break. An entry that no longer holds fails, so lists only shrink.
"""

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

KNOWN_CIRCLES = {
    frozenset({"data/readers/opening.py", "data/readers/tar.py", "data/sources.py", "data/text_rich/filtering.py"})
}
KNOWN_LONG = {"data/generated/options.py", "training/config.py", "training/stages.py"}
LONGEST = 400

# Rooms that may open or decode an image. Making one of an array of pixels is drawing and free everywhere.
IMAGE_ROOMS = ("images/", "data/generated/")
OPENERS = {"Image.open", "Image.frombytes", "Image.frombuffer", "ImageFile.Parser"}


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


def files_imported_by(path: Path, modules: dict[str, Path]) -> set[Path]:
    """Files of the package that a file imports when it runs, lazily or not; imports for type checkers do not count."""
    found: set[Path] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in inner]
        found |= {modules[name] for name in names if name in modules}
        waiting += ast.iter_child_nodes(node)
    return found - {path}


def circles(imported: dict[Path, set[Path]]) -> set[frozenset[Path]]:
    """Groups of two or more files that reach each other."""
    reached: dict[Path, set[Path]] = {}
    for start in imported:
        seen: set[Path] = set()
        waiting = list(imported[start])
        while waiting:
            path = waiting.pop()
            if path not in seen:
                seen.add(path)
                waiting += imported.get(path, set())
        reached[start] = seen
    return {
        frozenset(other for other in reached[path] if path in reached[other])
        for path in imported
        if path in reached[path]
    }


def test_a_circle_through_a_lazy_import_is_found(tmp_path: Path) -> None:
    sources = {
        "first": "from unclipped.second import value\n",
        "second": "def late():\n    from unclipped import third\n",
        "third": "import unclipped.first\n",
        "typed": "if TYPE_CHECKING:\n    from unclipped.user import name\n",
        "user": "import unclipped.typed\n",
    }
    modules = {f"unclipped.{name}": tmp_path / f"{name}.py" for name in sources}
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    found = circles({path: files_imported_by(path, modules) for path in modules.values()})
    assert found == {frozenset(modules[f"unclipped.{name}"] for name in ("first", "second", "third"))}


def test_no_circles_between_files() -> None:
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    # The package's own entry files reach every room by design: only circles below them are meant.
    inner = {name: path for name, path in modules.items() if path.parent != PACKAGE}
    found = circles({path: files_imported_by(path, inner) for path in inner.values()})
    named = {frozenset(str(path.relative_to(PACKAGE)) for path in circle) for circle in found}
    assert not named - KNOWN_CIRCLES, "files that import each other: move what both need below them"
    assert not KNOWN_CIRCLES - named, "a listed circle is gone or smaller: change the list"


def opened_in(source: str) -> set[str]:
    """Calls by which a source opens or decodes an image, as `Image.open`, through a module or an imported name."""
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(".".join(ast.unparse(node).split(".")[-2:]))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("PIL."):
            found |= {f"{node.module.split('.')[-1]}.{alias.name}" for alias in node.names}
    return found & OPENERS


@pytest.mark.parametrize("source", ["PIL.Image.open(f)", "Image.open(f)", "from PIL.Image import open as read"])
def test_an_opened_image_is_found(source: str) -> None:
    assert opened_in(source) == {"Image.open"}
    assert not opened_in("Image.new('RGB', size); path.open()")


def test_images_have_one_door() -> None:
    named = {str(path.relative_to(PACKAGE)): opened_in(path.read_text()) for path in PACKAGE.rglob("*.py")}
    found = {name: calls for name, calls in named.items() if calls}
    assert any(name.startswith("images/") for name in found), "the door itself was not seen: the check looks past it"
    outside = {name: calls for name, calls in found.items() if not name.startswith(IMAGE_ROOMS)}
    assert not outside, "only images/ opens and decodes images: call its functions"


def test_files_are_short() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    long = {name for name, count in lines.items() if count > LONGEST}
    assert not long - KNOWN_LONG, f"files of more than {LONGEST} lines: split them by ideas"
    assert not KNOWN_LONG - long, "a listed file is short now: take it off the list"
