"""Single modules of packages that cannot be installed beside the project, to compare with.

open_clip and lightly import torchvision, and with it in the environment transformers fails beside a CPU build of torch.
The modules that tests need import torch alone. The packages lie in `oracles` inside the environment, which is never on
`sys.path`; a module is executed with empty packages in the place of its parents.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(sys.prefix) / "oracles"
PINS = Path(__file__).resolve().parents[1] / "parity" / "oracles.txt"


def missing_packages(folder: Path) -> list[str]:
    """Pinned packages that do not lie in `folder` at their pinned version, as `name==version`."""
    pins = re.findall(r"^([\w-]+)==([\w.]+)$", PINS.read_text(), flags=re.MULTILINE)
    return [f"{name}=={version}" for name, version in pins if not (folder / f"{name}-{version}.dist-info").is_dir()]


def oracle(name: str) -> ModuleType:
    """The module of that dotted name. Skips the test, naming the command to run, where its package is not there."""
    if missing := missing_packages(FOLDER):
        pytest.skip(
            f"{', '.join(missing)} not in {FOLDER}: make test, or "
            f"python -m pip install --no-deps --upgrade --target {FOLDER} -r tests/parity/oracles.txt"
        )
    return load_module(FOLDER, name)


@cache
def load_module(folder: Path, name: str) -> ModuleType:
    """The module `name` of a package in `folder`; what it imports from its own package is found there too.

    No `__init__` of that package runs, and `sys.modules` is left as it was.
    """
    top = name.split(".")[0]

    def taken() -> dict[str, ModuleType]:
        return {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == top}

    before = taken()
    for init in (folder / top).rglob("__init__.py"):
        package = ModuleType(".".join(init.parent.relative_to(folder).parts))
        package.__path__ = [str(init.parent)]
        sys.modules[package.__name__] = package
    try:
        return importlib.import_module(name)
    finally:
        taken()
        sys.modules.update(before)
