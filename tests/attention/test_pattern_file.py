"""Pattern files: read back as written, taken in the place of a text, refused with the field named."""

from __future__ import annotations

from pathlib import Path

import pytest

from unclipped.attention.config import SparseConfig
from unclipped.attention.pattern_file import PatternFile, read_pattern_file, write_pattern_file
from unclipped.attention.prefill import sparse_prefill
from unclipped.core.errors import DataError

CONTENTS = PatternFile(pattern="per_layer(full | topk(k=2))", key_block=4, query_block=8, chosen={"model": "m"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_pattern_file(tmp_path / "pattern.yaml", CONTENTS)
    return tmp_path / "pattern.yaml"


def test_a_file_reads_back(path: Path) -> None:
    assert read_pattern_file(path) == CONTENTS


def test_a_configuration_holds_the_pattern_itself(path: Path) -> None:
    config = SparseConfig(pattern=str(path))
    assert (config.pattern, config.key_block, config.query_block) == (CONTENTS.pattern, 4, 8)
    assert SparseConfig.model_validate(config.model_dump()) == config
    given = SparseConfig.model_validate({"pattern": str(path), "query_block": 16})
    assert (given.key_block, given.query_block) == (4, 16)


def test_sparse_prefill_takes_a_file(path: Path) -> None:
    from support.tiny_models import tiny_lm

    model = tiny_lm()
    with sparse_prefill(model, str(path), fallback="never") as sparse:
        assert str(sparse.state.pattern) == CONTENTS.pattern
        assert (sparse.state.key_block, sparse.state.query_block) == (4, 8)
    with sparse_prefill(model, "topk(2)") as sparse:
        assert (sparse.state.key_block, sparse.state.query_block) == (128, 256)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("pattern: [", "not valid YAML"),
        ("- topk(2)", "expected fields such as 'pattern', found list"),
        ("key_block: 4", "field 'pattern': Field required"),
        ("pattern: topk(2)\nkey_blok: 4", "field 'key_blok'"),
        ("pattern: topk(2)\nkey_block: 0", "field 'key_block'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(DataError, match="pattern file") as caught:
        SparseConfig(pattern=str(tmp_path / "bad.yaml"))
    assert "bad.yaml" in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: No such file.*prefill search"):
        SparseConfig(pattern=str(tmp_path / "none.yaml"))
