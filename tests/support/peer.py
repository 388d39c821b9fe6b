"""The common test suites of transformers, from its source distribution, applied to classes of this project.

`make test-all` unpacks the distribution into `peer` inside the environment; nothing else imports from there. What the
distribution leaves out (the mixins of export and generation, helpers that start processes) is taken from the checkout
that UNCLIPPED_TRANSFORMERS names, and is replaced by the small stand-ins below where there is none.
"""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import transformers

from support.tiny_models import tiny_image

FOLDER = Path(sys.prefix) / "peer"
CHECKOUT = "UNCLIPPED_TRANSFORMERS"
EVERY = "UNCLIPPED_PEER_ALL"
PACKAGE = "transformers_suites"
DISTRIBUTION = f"transformers-{transformers.__version__}"


def root() -> Path:
    """Folder of the suites: the named checkout, else the unpacked distribution. Skips the module when none is there."""
    if named := os.environ.get(CHECKOUT):
        if not (Path(named) / "tests" / "test_modeling_common.py").is_file():
            pytest.skip(f"{CHECKOUT}={named}: no tests/test_modeling_common.py in it", allow_module_level=True)
        return Path(named)
    folder = FOLDER / DISTRIBUTION
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: make test-peer puts the suites there", allow_module_level=True)
    return folder


def has(name: str) -> bool:
    """Whether the suites hold the module of that dotted name, relative to `tests`."""
    return root().joinpath("tests", *name.split(".")).with_suffix(".py").is_file()


@cache
def suite(name: str) -> ModuleType:
    """A module of the suites by its dotted name relative to `tests`."""
    with _importable():
        return importlib.import_module(f"{PACKAGE}.{name}")


@contextmanager
def _importable() -> Iterator[None]:
    """The suites as a package of their own, with a stand-in for each helper module that is not there."""
    tests = str(root() / "tests")
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [tests]
        sys.modules[PACKAGE] = package
        for name, members in STAND_INS.items():
            if not has(name):
                _enter(f"{PACKAGE}.{name}", members)
        if not (root() / "utils" / "fetch_hub_objects_for_ci.py").is_file():
            _enter("fetch_hub_objects_for_ci", {"url_to_local_path": lambda _: _picture()})
    before = list(sys.path)
    sys.path.append(str(FOLDER))  # the package `parameterized` lies there
    try:
        with patch("transformers.utils.direct_transformers_import", lambda *_: transformers):
            yield
    finally:
        sys.path[:] = before


def _enter(name: str, members: dict[str, Any]) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules:
        _enter(parent, {"__path__": []})


@cache
def _picture() -> str:
    """A file with a picture, in the place of those that the suites take from the network."""
    path = Path(tempfile.mkdtemp(prefix="peer-")) / "picture.png"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    tiny_image(48, 64).save(path)
    return str(path)


class _Nothing:
    """In the place of a mixin that the distribution leaves out."""


STAND_INS: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": _Nothing},
    "generation.test_utils": {"GenerationTesterMixin": _Nothing},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
    "distributed_testing_utils": {"run_distributed": None},
}


def unfit(*tests: dict[str, str]) -> Callable[[type], type]:
    """Expect the tests named as keys of these tables to fail, for the reasons given as their values.

    One that passes after all fails the run, so that the tables hold what is true and no more.
    """

    def decorate(cls: type) -> type:
        for table in tests:
            for name, reason in table.items():
                inherited = getattr(cls, name)

                def expected_to_fail(self: Any, *args: Any, _inherited: Any = inherited, **kwargs: Any) -> Any:
                    return _inherited(self, *args, **kwargs)

                expected_to_fail.__name__ = name
                setattr(cls, name, pytest.mark.xfail(reason=reason, strict=True)(expected_to_fail))
        return cls

    return decorate
