"""Python and data on the pages: blocks run, rows open in the format that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from docs_pages import PAGES, blocks

from unclipped.data.config import SourceConfig
from unclipped.data.sources import open_source

EXTENDING = ("add-an-encoder.md", "add-a-connector.md")  # run by test_docs_extending.py, in a changed copy
WITH_PYTHON = [p for p in PAGES if p.name not in EXTENDING and any(b.language == "python" for b in blocks(p))]


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, page.name, "exec"), namespace)


def test_rows_open_and_read_as_the_page_says(workspace: Path) -> None:
    shown = {block.file for page in PAGES for block in blocks(page) if block.language == "jsonl"}
    assert {"formats/llava.jsonl", "formats/sharegpt.jsonl", "formats/cambrian.jsonl", "formats/text.jsonl"} <= shown
    for file in shown:
        assert file is not None
        source = open_source(SourceConfig(source=file))
        assert source.length is not None
        samples = [source[index] for index in range(source.length)]
        rows = [json.loads(line) for line in (workspace / file).read_text().splitlines()]
        assert len(samples) == len(rows) >= 2
        kind = Path(file).stem
        if kind in ("llava", "sharegpt", "cambrian"):
            assert open_source(SourceConfig(source=file, format=kind))[0] == samples[0]  # as told from the content
            assert [part.source for part in samples[0].images] == ["formats/1.png"]
            assert samples[0].answers == ("418",)


@pytest.mark.usefixtures("workspace")
def test_the_parts_of_the_page_share_no_meter() -> None:
    sides = {}
    for side in ("train", "dev"):
        source = open_source(
            SourceConfig(source="my-folder", cluster=r"^meter-(\d+)-", part={"share": 0.3, "side": side})  # type: ignore[arg-type]
        )
        assert source.length
        sides[side] = {source[index].cluster for index in range(source.length)}
    assert not sides["train"] & sides["dev"]
