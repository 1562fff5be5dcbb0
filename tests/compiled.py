"""Triton kernels compiled for an H200 on machines without one: whether they compile, and what they take.

    found = compile_for_h200([Kernel("scaler.nn.color_kernels:normalise", {"x": "*fp32", "n": "i32"}, {"block": 128})])
    found[0].spilled == 0

Compilation wants a process of its own, since the tests' processes interpret kernels (see tests/conftest.py).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """A kernel and the types it is compiled for.

    Attributes:
        name: module:function.
        signature: types of its arguments in Triton's words (*fp32, i32, …), without the constants.
        constants: values of its tl.constexpr arguments.
        num_warps, num_stages: as it is launched.
    """

    name: str
    signature: dict[str, str]
    constants: dict[str, int | float | bool | str]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on sm_90: shared memory of a program in bytes, registers of a thread, and bytes of them that
    are spilled to memory (both ways)."""

    shared: int
    registers: int
    spilled: int


def compile_for_h200(kernels: Sequence[Kernel]) -> list[Compiled]:
    """Compile them all, in one process.

    Raises:
        AssertionError: one does not compile; holds what the compiler says.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.compiled"],
        input=json.dumps([asdict(kernel) for kernel in kernels]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    return [Compiled(**found) for found in json.loads(run.stdout.splitlines()[-1])]


def _compile(kernel: Kernel) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    module, _, function = kernel.name.partition(":")
    jitted = getattr(importlib.import_module(module), function)
    types = dict.fromkeys(kernel.constants, "constexpr") | kernel.signature
    source = ASTSource(
        fn=jitted,
        signature={name: types[name] for name in jitted.arg_names},
        constexprs=dict(kernel.constants),
        attrs={  # torch's tensors begin at such addresses, which a launch finds out
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(jitted.arg_names) if types[name].startswith("*")
        },
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as ptx:
        ptx.write(made.asm["ptx"])
        ptx.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name", "sm_90a", ptx.name, "-o", os.devnull]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr + run.stdout
        said = run.stderr
    found = {name: int(n) for n, name in re.findall(r"(\d+) (?:bytes )?(registers|spill stores|spill loads)", said)}
    return Compiled(made.metadata.shared, found["registers"], found["spill stores"] + found["spill loads"])


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(Kernel(**item))) for item in json.load(sys.stdin)]))
