"""Where a result came from: hardware, versions, git revision, date and command. No host names, no user paths."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "unclipped", "torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "numpy", "pillow",
    "peft", "trl",
)  # fmt: skip
_ABSOLUTE = re.compile(r"(?:[A-Za-z]:)?[/\\](?:[^/\\]*[/\\])*([^/\\]*)$")


def environment(*, accelerators: bool = True) -> dict[str, Any]:
    """Hardware, versions, git revision when the package runs from a checkout, date (UTC) and command line.

    accelerators: also those that torch sees; work that only reads files leaves them out and loads no torch.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware": hardware(accelerators=accelerators),
        "versions": {"python": platform.python_version(), **package_versions()},
        "git": git_revision(Path(__file__).resolve().parent),
    }


def command_line(arguments: list[str]) -> str:
    """The command as typed, absolute paths cut to their last part (also behind `key=`), the program to its name."""
    name = Path(arguments[0]).name
    program = "unclipped" if name in ("__main__.py", "unclipped") else name
    return shlex.join([program, *(_without_folders(argument) for argument in arguments[1:])])


def _without_folders(argument: str) -> str:
    key, separator, value = argument.rpartition("=")
    prefix, colon, path = value.partition(":") if value.startswith(("llm:", "timm:")) else ("", "", value)
    path = os.path.expanduser(path)
    match = _ABSOLUTE.match(path)
    shown = f"…/{match.group(1)}" if match else path
    return f"{key}{separator}{prefix}{colon}{shown}"


def hardware(*, accelerators: bool = True) -> dict[str, Any]:
    """Processor model, cores this process may use, memory in GiB, and the accelerators that torch sees, if wanted."""
    found: dict[str, Any] = {"cpu": cpu_model(), "cores": _usable_cores(), "memory_gib": _memory_gib()}
    if not accelerators:
        return found
    import torch

    if torch.cuda.is_available():
        found["gpu"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    elif torch.backends.mps.is_available():
        found["gpu"] = ["Apple MPS"]
    else:
        found["gpu"] = []
    return found


def cpu_model() -> str:
    """Name of the processor; the architecture where the system does not tell more."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not a Linux system: the portable name below is all there is
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that shape a result; packages that are not installed are left out."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Revision of the checkout that holds `folder` and whether tracked files differ from it; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):  # git is not installed or hangs: there is no revision to tell
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy below someone else's checkout (a virtual environment in a repository) is not that checkout.
    if git("ls-files", "--error-unmatch", "environment.py") is None:
        return None
    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "is_modified": bool(git("status", "--porcelain", "--untracked-files=no"))}
