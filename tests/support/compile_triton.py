"""Compiles the Triton kernels for a GPU that need not be there: `python compile_triton.py 128 bf16 [--capability 90]`.

Prints one JSON line for each kernel: shared memory, and registers and spills as ptxas reports them. Run in a process of
its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unclipped.attention import triton_kernel
from unclipped.attention.triton_backend import Tiling, padded_width, tilings_for

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    "sums": "*fp32", "delta": "*fp32", "starts": "*i32", "blocks": "*i32", "masked_starts": "*i32",
    "masked_blocks": "*i32", "reach": "*i32",
}  # fmt: skip
STATES = ("query", "key", "value", "output", "gradient", "result", "key_result", "value_result")


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, tiling: Tiling, capability: int) -> Any:
    """As the launcher would specialise it for contiguous states: strides and addresses are multiples of 16."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS.get(name) or (
            f"*{dtype}" if name in STATES else "fp32" if name == "scale" else "i32"
        )
        if signature[name].startswith("*") or name.endswith(("_head", "_token")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {name: constants[name] for name in constants}, attributes)
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assembled(code: str, capability: int) -> tuple[int, int]:
    """Registers of a thread and bytes of spills, from the PTX."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(code)
        said = subprocess.run(
            [ptxas, "-v", f"--gpu-name=sm_{capability}a", "kernel.ptx", "-o", "kernel.cubin"],
            cwd=folder, capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spilled = re.search(r"(\d+) bytes spill stores", said)
    used = re.search(r"Used (\d+) registers", said)
    assert spilled is not None
    assert used is not None
    return int(used[1]), int(spilled[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("width", type=int)
    parser.add_argument("dtype", choices=TYPES)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--group", type=int, default=2)
    arguments = parser.parse_args()
    tilings = tilings_for(arguments.width, TYPES[arguments.dtype])
    common = {
        "GROUP": arguments.group, "WIDTH": arguments.width, "PADDED": padded_width(arguments.width),
        "QUERY_BLOCK": 256, "KEY_BLOCK": 128, "WIDEN": False,
    }  # fmt: skip
    for name in ("forward", "query_gradient", "key_gradient", "delta"):
        kernel = getattr(triton_kernel, f"{name}_kernel")
        if name == "delta":
            tiling = Tiling(32, 0, 0, 4, 3)
            constants = {"WIDTH": arguments.width, "PADDED": padded_width(arguments.width), "ROWS": 32}
        else:
            tiling = getattr(tilings, name)
            constants = {**common, "ROWS": tiling.rows, "COLUMNS": tiling.columns, "MASKED": tiling.masked}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        compiled = compile_kernel(kernel, constants, arguments.dtype, tiling, arguments.capability)
        registers, spills = assembled(compiled.asm["ptx"], arguments.capability)
        line = {"kernel": name, "shared": compiled.metadata.shared, "registers": registers, "spills": spills}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
