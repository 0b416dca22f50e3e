"""Compile kernels for GPUs that are not here, and say what they use. A JSON list from stdin, one to stdout.

Each item names a kernel of kernels/ with the arguments of one of its launches:
    module, kernel   "sega_step", "_sega_step"
    types            {argument: type}; else an argument ending in _ptr is "*fp32" and any other "i32"
    constants        {argument: value}: the constexprs, and arguments that a launch specialises because they are 1
    aligned          integer arguments that are multiples of 16; pointers always are
    num_warps, fuse  as in kernels/_launch.py; limit is its registers
Each answer holds target, registers (a thread), stack (bytes a thread: what was spilled), and cubin (bytes).
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 90, 100)
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def usage(variant: dict[str, Any], target: int) -> dict[str, Any]:
    kernel = getattr(importlib.import_module(f"ledits_min.kernels.{variant['module']}"), variant["kernel"])
    constants = variant["constants"]
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names} | variant["types"]
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [
        i
        for i, name in enumerate(signature)
        if name not in constants and (name.endswith("_ptr") or name in variant["aligned"])
    ]
    limit = {"maxnreg": variant["limit"]} if variant.get("limit") else {}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": variant["num_warps"], "enable_fp_fusion": variant["fuse"], **limit},
    )
    cubin = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", report)
    return {"target": target, "registers": int(found[0]), "stack": int(found[1]), "cubin": len(cubin), **variant}


if __name__ == "__main__":
    variants = json.load(sys.stdin)
    json.dump([usage(variant, target) for variant in variants for target in TARGETS], sys.stdout)
