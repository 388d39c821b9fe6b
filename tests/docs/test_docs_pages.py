"""The pages say what the package has: links, the recipe reference, the lists of what is supported, the rooms."""

from __future__ import annotations

import ast
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import get_args

import pytest
import typer
from docs_pages import PAGES, ROOT

from unclipped.cli.app import app
from unclipped.connectors.projections import CONNECTORS
from unclipped.connectors.steps import CONNECTOR_STEPS
from unclipped.data.generated.generator import GENERATORS
from unclipped.data.generated.registry import open_generated  # noqa: F401 - enters the generators
from unclipped.encoders.base import ENCODERS
from unclipped.encoders.build import encoder_class
from unclipped.encoders.spec import BASELINE_OBJECTIVES
from unclipped.evaluation.scorers import SCORERS
from unclipped.recipes.loading import builtin_names, read_recipe
from unclipped.recipes.reference import reference
from unclipped.training.config import PretrainConfig

PACKAGE = ROOT / "src" / "unclipped"
README = (ROOT / "README.md").read_text()
OWN_DATA = (ROOT / "docs" / "bring-your-own-data.md").read_text()
ENCODER_PAGE = (ROOT / "docs" / "encoder-evaluation.md").read_text()
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.is_file(), f"{page.name}: no file {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings}
            assert heading in slugs, f"{page.name}: no heading {target}"


def test_files_named_in_backticks_exist() -> None:
    for page in PAGES:
        for name in re.findall(
            r"`((?:src|tests|docs|benchmarks|encoders|connectors)/[\w./-]+\.\w+)`", page.read_text()
        ):
            if name == "src/unclipped/encoders/vit_msn.py":
                continue  # the reader writes it
            candidates = [ROOT / name, PACKAGE / name]
            assert any(path.exists() for path in candidates), f"{page.name}: no file {name}"


def test_recipe_reference_is_up_to_date() -> None:
    page = (ROOT / "docs" / "recipe-reference.md").read_text()
    assert page == reference(), "write it anew: python -m unclipped.recipes.reference > docs/recipe-reference.md"


def test_readme_lists_what_is_registered() -> None:
    own = {"unclipped_llm_encoder"}  # spelt llm: for users
    for name in set(ENCODERS.names()) - own:
        assert f"`{name}`" in README, f"encoder {name}"
    baselines = next(line for line in README.splitlines() if line.startswith("| declared baselines"))
    for name in set(ENCODERS.names()) - own:
        is_baseline = encoder_class(name, baseline=True).objective in BASELINE_OBJECTIVES
        assert is_baseline == (f"`{name}`" in baselines), name
    for name in SCORERS.names():
        assert f"`{name}`" in README, f"scorer {name}"
        assert f"| `{name}` |" in OWN_DATA, f"scorer {name}"
    for name in GENERATORS.names():
        assert f"`{name}`" in README, f"generated:{name}"
        assert f"`generated:{name}`" in OWN_DATA
    rows = {line.split(" | ")[0].strip("| "): line for line in README.splitlines() if line.startswith("| ")}
    for name in get_args(PretrainConfig.model_fields["objective"].annotation):
        assert f"`{name}`" in rows["pretraining"], f"objective {name}"
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`{name}`" in rows["commands"], f"command {name}"
    for name in [*CONNECTOR_STEPS.names(), *CONNECTORS.names()]:
        assert re.search(rf"`{name}[`(]", README), f"connector {name}"


def test_every_built_in_recipe_is_shown() -> None:
    # quickstart-lm runs inside `unclipped quickstart`, which is the page's first command.
    small = {name.removesuffix("-gpu") for name in builtin_names()}
    assert small <= set(builtin_names())
    assert "`-gpu`" in OWN_DATA
    for name in small - {"quickstart-lm"}:
        page = ENCODER_PAGE if read_recipe(name)["kind"] == "encoder_evaluation" else OWN_DATA
        assert re.search(rf"\b{name}\b", page), f"recipe {name}"


def test_every_imported_package_is_explained() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text().lower()
    spelt = {"PIL": "pillow", "yaml": "pyyaml", "pydantic_core": "pydantic"}
    imported: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    for name in imported - set(sys.stdlib_module_names) - {"unclipped"}:
        assert spelt.get(name, name).lower() in page, f"dependencies.md: nothing about {name}"


def test_architecture_and_its_picture_show_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    words = " ".join(text.text or "" for text in svg("rooms.svg").iter("{http://www.w3.org/2000/svg}text"))
    for room in ROOMS:
        assert f"`{room}/`" in page, f"architecture.md: no {room}/"
        assert re.search(rf"\b{room}\b", words), f"rooms.svg: no {room}"


@pytest.mark.parametrize("name", ["overview.svg", "rooms.svg"])
def test_pictures_are_described(name: str) -> None:
    root = svg(name)
    for part in ("title", "desc"):
        found = root.find(f"{{http://www.w3.org/2000/svg}}{part}")
        assert found is not None
        assert found.text


def svg(name: str) -> ElementTree.Element:
    return ElementTree.parse(ROOT / "docs" / "images" / name).getroot()
