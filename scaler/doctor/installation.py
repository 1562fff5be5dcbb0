"""torch and torchvision as they really work here: imported, asked for the GPU, and made to compute."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaler.doctor.finding import Finding, counted, first_line

_ERRORS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}  # of a product of 512 terms, relative to its norm
_SPEED_SIZE = 8192  # rows and columns of the matrices whose product is timed
_FREE = 0.9  # of a GPU's memory; less: somebody else is there


def check(asked: dict[str, Any]) -> Iterator[Finding]:
    """torch, torchvision's compiled operations, and the device that a training would use.

    Args:
        asked: `quick`: GPUs are counted and left alone, since using one takes memory from whoever trains on it.
    """
    if asked["quick"]:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is_available() then starts nothing on the GPU
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA's that is missing or of another version
        yield Finding(
            "error",
            "torch",
            f"cannot be imported: {first_line(error)}",
            "pip install --force-reinstall torch torchvision",
        )
        return
    yield _torch(torch)
    yield _torchvision(torch)
    yield from _devices(torch, quick=asked["quick"])


def _torch(torch: Any) -> Finding:
    facts = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _version(torch.backends.cudnn.version() if torch.version.cuda else None),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
    }
    built = f"for CUDA {facts['cuda']}" if facts["cuda"] else "for the CPU"
    parts = [f"{torch.__version__}, built {built}"]
    parts += [f"{label} {facts[key]}" for key, label in (("cudnn", "cuDNN"), ("nccl", "NCCL")) if facts[key]]
    found = ", ".join(parts)
    if not torch.distributed.is_gloo_available():
        return Finding("error", "torch", f"{found}, without gloo", "pip install --force-reinstall torch", facts=facts)
    return Finding("ok", "torch", found, facts=facts)


def _version(cudnn: int | None) -> str | None:
    """cuDNN's number, as 92600, as it is written."""
    return f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else None


def _torchvision(torch: Any) -> Finding:
    """Whether torchvision's operations are those of this torch: a wrong pair fails when the first one is looked up."""
    fix = f"pip install --upgrade 'torch=={torch.__version__.partition('+')[0]}' torchvision"
    try:
        import torchvision

        boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        found = f"does not work with torch {torch.__version__}: {first_line(error)}"
        return Finding("error", "torchvision", found, fix)
    if kept != [0, 2]:
        return Finding("error", "torchvision", f"its nms keeps the boxes {kept} instead of [0, 2]", fix)
    return Finding("ok", "torchvision", f"{torchvision.__version__}, its compiled operations work")


# ---------------------------------------------------------------------- devices


def _devices(torch: Any, *, quick: bool) -> Iterator[Finding]:
    """The GPUs that the kernel shows, and those that torch can use."""
    shown, driver = len(list(Path("/dev").glob("nvidia[0-9]*"))), _driver()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        facts = {"gpus": torch.cuda.device_count(), "driver": driver}
        if quick:
            yield Finding("ok", "GPU", f"{facts['gpus']} usable by torch, driver {driver}", facts=facts)
        else:
            for number in range(facts["gpus"]):
                yield _gpu(torch, number, driver=driver)
        return
    if shown:
        yield _unusable(torch, shown, driver=driver, reason=" ".join(str(warning.message) for warning in said))
    elif os.environ.get("NVIDIA_VISIBLE_DEVICES", "void") not in ("void", "none", ""):  # set in images made for GPUs
        yield Finding(
            "warning",
            "GPU",
            "this container is made for GPUs and has been given none: training would run on the CPU",
            "docker run --gpus all (compose: gpus: all); on the machine: nvidia-ctk runtime configure",
        )
    if not quick or not shown:
        yield _cpu(torch)


def _driver() -> str | None:
    """The kernel module's version."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"(\d+\.\d+(\.\d+)?)\s", text)
    return found[1] if found else None


def _unusable(torch: Any, shown: int, *, driver: str | None, reason: str) -> Finding:
    """Why torch uses none of the GPUs that are there."""
    facts = {"gpus": shown, "driver": driver}
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        found = f"{shown} here, but torch {torch.__version__} is built for the CPU"
        return Finding("error", "GPU", found, "pip install --force-reinstall torch torchvision", facts=facts)
    if hidden is not None and hidden.strip() in ("", "-1"):
        found = f"{shown} here, hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
        return Finding("error", "GPU", found, "unset CUDA_VISIBLE_DEVICES", facts=facts)
    found = f"{shown} here, but torch cannot use them (driver {driver}): {reason or 'no reason given'}"
    fix = f"update the driver to one for CUDA {torch.version.cuda} (nvidia-smi says which it is for), or an older torch"
    return Finding("error", "GPU", found, fix, facts=facts)


def _gpu(torch: Any, number: int, *, driver: str | None) -> Finding:
    """One GPU: used, compared with the CPU in float64, and timed."""
    try:
        device = torch.device("cuda", number)
        properties = torch.cuda.get_device_properties(device)
        wrong = _wrong_products(torch, device)
        free, total = torch.cuda.mem_get_info(device)
        teraflops = _teraflops(torch, device) if not wrong else 0.0
    except (RuntimeError, AssertionError) as error:
        return Finding(
            "error",
            f"GPU {number}",
            f"cannot be used (driver {driver}): {first_line(error)}",
            "nvidia-smi says whether it is healthy and free; without kernels for it: pip install --upgrade torch",
        )
    facts = {
        "name": properties.name,
        "driver": driver,
        "memory_gib": total / 2**30,
        "free_gib": free / 2**30,
        "bf16_teraflops": teraflops,
    }
    found = (
        f"{properties.name}, {total / 2**30:.0f} GiB, driver {driver}: matrix products are right, "
        f"{teraflops:.0f} TFLOP/s in bf16"
    )
    if wrong:
        fix = "take this GPU out of use (CUDA_VISIBLE_DEVICES) and have it tested: dcgmi diag -r 3"
        return Finding("error", f"GPU {number}", f"{properties.name}: {wrong}", fix, facts=facts)
    if free < _FREE * total:
        found += f"; only {free / 2**30:.0f} GiB are free"
        return Finding("warning", f"GPU {number}", found, "nvidia-smi shows whose processes are on it", facts=facts)
    return Finding("ok", f"GPU {number}", found, facts=facts)


def _cpu(torch: Any) -> Finding:
    wrong = _wrong_products(torch, torch.device("cpu"))
    if wrong:
        return Finding("error", "CPU", wrong, "pip install --force-reinstall torch; then have the memory tested")
    threads = counted(torch.get_num_threads(), "thread")
    return Finding("ok", "CPU", f"no GPU: training runs on the CPU over gloo; products are right on {threads}")


def _wrong_products(torch: Any, device: Any) -> str:
    """Where products of matrices differ from the CPU's in float64 by more than rounding; empty: nowhere."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    exact = a @ b
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, limit in _ERRORS.items():
        dtype = getattr(torch, name)
        product = (a.to(device, dtype) @ b.to(device, dtype)).cpu().double()
        error = float((product - exact).norm() / exact.norm())
        if not error < limit:
            return f"a product of matrices in {name} is off by {error:.1e} of its norm (rounding: below {limit:.0e})"
    return ""


def _teraflops(torch: Any, device: Any) -> float:
    a = torch.randn(_SPEED_SIZE, _SPEED_SIZE, device=device, dtype=torch.bfloat16)
    for rounds in (3, 10):  # the first time is to warm up
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(rounds):
            a @ a
        torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - start) / rounds
    return float(2 * _SPEED_SIZE**3 / seconds / 1e12)
