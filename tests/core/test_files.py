"""Files and folders written whole: the mode that the umask gives, all or nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from unclipped.core.errors import UnclippedError
from unclipped.core.files import whole_folder, write_array, write_json, write_text


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o002, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "a" / "text.md", "a")
    write_json(tmp_path / "a" / "fields.json", {})
    write_array(tmp_path / "a" / "values.npy", np.zeros(2))
    assert {path.name: mode(path) for path in (tmp_path / "a").iterdir()} == dict.fromkeys(
        ("text.md", "fields.json", "values.npy"), 0o666 & ~umask
    )


@pytest.mark.parametrize("is_there", [False, True])
def test_folders_and_what_libraries_write_into_them_have_it_too(tmp_path: Path, umask: int, is_there: bool) -> None:
    """safetensors, and so save_pretrained, writes files of mode 0600."""
    model = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    folder = tmp_path / "model"
    if is_there:
        folder.mkdir(mode=0o700)
        (folder / "old.txt").touch()
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        (temporary / "side").mkdir()
        save_file({"a": torch.ones(2)}, temporary / "side" / "side.safetensors")
        write_json(temporary / "side" / "side.json", {})
    files = {path.relative_to(folder).as_posix(): mode(path) for path in folder.rglob("*") if path.is_file()}
    names = ("config.json", "model.safetensors", "side/side.safetensors", "side/side.json")
    assert files == dict.fromkeys(names, 0o666 & ~umask)
    assert {mode(folder), mode(folder / "side")} == {0o777 & ~umask}
    assert torch.equal(load_file(folder / "side" / "side.safetensors")["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "text.md", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "text.md", "new \ud800")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnclippedError, match=r"cannot write .*folder: .*choose another"):
        write_text(tmp_path / "folder", "new")
    with pytest.raises(OSError, match="folder"):
        write_array(tmp_path / "folder", np.zeros(2))
    assert {path.name for path in tmp_path.iterdir()} == {"text.md", "folder"}
    assert (tmp_path / "text.md").read_text() == "old"


def test_a_folder_whose_writer_fails_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with whole_folder(folder) as temporary:
        (temporary / "a.txt").write_text("old")
    before = folder.stat().st_ino
    with pytest.raises(UnclippedError, match=r"cannot write .*model: "), whole_folder(folder) as temporary:
        (temporary / "missing" / "a.txt").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert ((folder / "a.txt").read_text(), folder.stat().st_ino) == ("old", before)
