"""DeepSpeed, imported as a run imports it, and the operations that it compiles on first use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from scaler.doctor.finding import Finding, first_line


def check(asked: dict[str, Any]) -> Iterator[Finding]:
    """Whether DeepSpeed can be imported, and whether what offload to the CPU needs could be compiled; nothing is."""
    if find_spec("deepspeed") is None:
        yield Finding("ok", "DeepSpeed", "not installed; zero1, zero2, zero3 need it (pip install 'scaler[deepspeed]')")
        return
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):
        return  # which `scaler.doctor.installation` tells
    try:
        import deepspeed
    except Exception as error:  # it looks for a compiler, for CUDA, for a launcher, and each fails in its own way
        fix = "pip install --upgrade 'scaler[deepspeed]'"
        if "CUDA_HOME" in str(error):
            fix = "install the CUDA toolkit (nvcc), or export DS_IGNORE_CUDA_DETECTION=1"
        yield Finding("error", "DeepSpeed", f"cannot be imported: {first_line(error)}", fix)
        return
    ops = sorted(name for name, fits in deepspeed.ops.__compatible_ops__.items() if fits)
    found, facts = f"{deepspeed.__version__} can be imported", {"ops": ops}
    missing = [program for program in ("g++", "ninja") if shutil.which(program) is None]
    if missing or "cpu_adam" not in ops:
        why = f"{' and '.join(missing)} missing" if missing else "its cpu_adam does not fit this machine"
        fix = "apt-get install g++ ninja-build, unless nothing is offloaded to the CPU"
        yield Finding("warning", "DeepSpeed", f"{found}; nothing can be compiled: {why}", fix, facts=facts)
    else:
        yield Finding("ok", "DeepSpeed", f"{found}; it can compile {', '.join(ops)}", facts=facts)
