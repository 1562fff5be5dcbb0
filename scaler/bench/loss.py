"""Forward and backward passes of the losses, ours and others', interleaved in one run: time, memory, agreement.

    scaler bench loss --size 8192
    scaler bench loss --method dinov2
    scaler bench loss --method dinov2 --size 64 --precision bf16 --compile     # on a GPU: what a step pays for them
    scaler bench loss --method sinkhorn --size 64 --precision bf16 --compile   # and for the teacher's targets before

NT-Xent's kernels on an H200, 131,072 embeddings of 128: at most 2 GB beside its inputs, three times as fast as "scaler,
tiles" or more, and gradients within 1e-3 (bf16) and 1e-5 (fp32) of float64's; then against those whose scores fit:

    scaler bench loss --size 65536 --precision bf16
    scaler bench loss --size 65536
    scaler bench loss --size 65536 --precision bf16 --temperature 0.05
    scaler bench loss --size 65536 --temperature 0.05 --width 512
    scaler bench loss --size 16384 --precision bf16
    python -m pytest tests/scaler/methods/simclr/test_loss_kernels.py      # hard cases

The others are lightly's, where it is installed, and what one writes first in plain torch: all scores in one matrix.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from scaler.bench.rounds import interleave, rate, ratio
from scaler.collectives import World
from scaler.methods.dinov2.loss import dino, ibot
from scaler.methods.dinov2.prototypes import Teacher, cross_entropy
from scaler.methods.dinov2.sinkhorn import sinkhorn_log_scaling
from scaler.methods.simclr.loss import nt_xent, runs_kernels

OURS, COMPILED, LIGHTLY, PLAIN = "scaler", "scaler, compiled", "lightly", "torch, all scores"
KERNELS, TILES = "scaler, kernels", "scaler, tiles"  # NT-Xent's on a GPU: "scaler" runs kernels where they can be
SIZES = {"simclr": 2048, "dinov2": 16, "sinkhorn": 16}
_FEW = 2048  # images of which a float64 gradient is no matter on a CPU
_BOTTLENECK, _LOCAL_CROPS, _GRID, _MASKED = 256, 8, 14, 58  # DINOv2: every second crop has so many masked patches
_TEMPERATURE, _TEACHER_TEMPERATURE = 0.1, 0.0625

Step = Callable[[], list[Tensor]]  # one forward and backward pass; the gradients of its inputs (Sinkhorn: targets)


def measure(
    method: str,
    *,
    size: int | None = None,
    prototypes: int = 65_536,
    width: int = 128,
    temperature: float = 0.1,
    precision: str = "fp32",
    compiled: bool = False,
    seconds: float = 0.5,
    rounds: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure the loss of one process on random embeddings, on the GPU if there is one.

    Args:
        method: simclr (NT-Xent), dinov2 (DINO and iBOT, 2 + 8 crops, bottlenecks of 256) or sinkhorn
            (the targets of its masked patches).
        size: images; None: 2,048 or 16.
        prototypes: of dinov2.
        width: channels of simclr's embeddings.
        temperature: of simclr.
        precision: fp32, or bf16: under autocast.
        compiled: whether ours also runs as strategy.compile has it.
        seconds: of each contender in a round.
        rounds: turns of each contender.

    Returns:
        `rows`, each with its name, `seconds` and `cpu_seconds` of a pass (medians), `times` ours, `peak_bytes` that a
        pass takes beside its inputs (None where the system does not tell) and `difference`, that of its gradients over
        their norm from those of `reference` (ours; of simclr float64's, on a CPU where there are few images); or
        `missing`, why it is not there. And what was measured.

    Raises:
        ValueError: an unknown method or precision.
    """
    if method not in SIZES:
        raise ValueError(f"no loss of {method!r}; there are {', '.join(SIZES)}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision is {precision!r}; take fp32 or bf16")
    size, device = size or SIZES[method], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lightly = importlib.util.find_spec("lightly") is not None
    missing: dict[str, str] = {} if lightly else {LIGHTLY: "not installed"}
    reference: Step | None = None
    if method == "simclr":
        steps, without, exact = _simclr(size, width, temperature, device=device, lightly=lightly)
        missing |= without
        reference = exact if device.type == "cuda" or size <= _FEW else None
    else:
        make = {"dinov2": _dinov2, "sinkhorn": _sinkhorn}[method]
        steps = make(size, device=device, lightly=lightly, prototypes=prototypes, compiled=compiled)
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    peaks, gradients = {}, {}
    for name, step in steps.items():
        say(f"memory of {name}")
        with autocast():
            step()  # libraries take their own memory once
            peaks[name], gradients[name] = _peak(step, device)
    truth = gradients[OURS] if reference is None else reference()

    def timed(step: Step) -> int:
        with autocast():
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1

    timers = {name: partial(timed, step) for name, step in steps.items()}
    blocks = interleave(timers, seconds=seconds, rounds=rounds, say=say)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "seconds": 1 / rate(blocks[name], "wall"),
            "cpu_seconds": 1 / rate(blocks[name], "cpu"),
            "times": ratio(blocks[OURS], blocks[name], "wall"),
            "peak_bytes": peaks[name],
            "difference": _difference(gradients[name], truth),
        }
        for name in steps
    ]
    rows += [{"name": name, "missing": why} for name, why in missing.items()]
    return {
        "method": method,
        "size": size,
        **({"width": width, "temperature": temperature} if method == "simclr" else {"prototypes": prototypes}),
        "reference": OURS if reference is None else "float64",
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "rows": rows,
    }


def _difference(gradients: list[Tensor], others: list[Tensor]) -> float:
    a, b = (torch.cat([gradient.flatten() for gradient in found]) for found in (gradients, others))
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------- contenders


def _simclr(
    size: int, width: int, temperature: float, *, device: torch.device, lightly: bool
) -> tuple[dict[str, Step], dict[str, str], Step]:
    """Contenders, those that are not there and why, and the gradients in float64."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2 * size, width, generator=generator).to(device).requires_grad_()
    positives = torch.arange(2 * size, device=device).roll(size)
    whole = _whole(4 * (2 * size) ** 2, device)
    itself = torch.eye(0 if whole else 2 * size, dtype=torch.bool, device=device)

    def ours(kernels: bool | None = None) -> Tensor:
        return nt_xent(embeddings, temperature=temperature, world=World(), kernels=kernels).loss

    def plain() -> Tensor:
        z = F.normalize(embeddings, dim=1)
        return F.cross_entropy((z @ z.T / temperature).masked_fill(itself, -torch.inf), positives)

    def exact() -> list[Tensor]:
        x = embeddings.detach().double().requires_grad_()
        return list(torch.autograd.grad(nt_xent(x, temperature=temperature, world=World()).loss, x))

    losses: dict[str, Callable[[], Tensor]] = {OURS: ours}
    missing = {}
    if runs_kernels(embeddings, temperature=temperature, num_keys=2 * size):
        losses[TILES] = partial(ours, False)
    else:
        missing[KERNELS] = (
            "need a GPU" if device.type == "cpu" else "not for this GPU, width or temperature, or no Triton"
        )
    if lightly:
        theirs = importlib.import_module("lightly.loss").NTXentLoss(temperature)
        losses[LIGHTLY] = lambda: theirs(*embeddings.chunk(2))
    losses[PLAIN] = plain
    for name in (LIGHTLY, PLAIN):
        if whole is not None and name in losses:
            missing[name] = whole
            del losses[name]
    return {name: partial(_gradients, loss, [embeddings]) for name, loss in losses.items()}, missing, exact


def _whole(scores: int, device: torch.device) -> str | None:
    """Why a contender that keeps so many bytes of scores, and copies of them, is left out on a GPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if 3 * scores <= free:
        return None
    return f"its scores take {scores / 2**30:.0f} GiB, more than a third of the {free / 2**30:.0f} GiB that are free"


def _unit(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, _BOTTLENECK, generator=generator), dim=-1).to(device)

    return unit


def _dinov2(size: int, *, device: torch.device, lightly: bool, prototypes: int, compiled: bool) -> dict[str, Step]:
    unit = _unit(device)
    mask = torch.zeros(2 * size, _GRID**2, dtype=torch.bool, device=device)
    mask[::2, :_MASKED] = True
    num_tokens = int(mask.sum())
    inputs = [unit(2 + _LOCAL_CROPS, size), unit(num_tokens), unit(prototypes)]
    crops, tokens, keys = (x.requires_grad_() for x in inputs)
    teacher_crops, teacher_tokens, teacher_keys = unit(2, size), unit(num_tokens), unit(prototypes)
    weights = torch.full((num_tokens,), 1 / _MASKED, device=device)

    def ours(fused: bool = False) -> Tensor:
        shift = teacher_keys.new_zeros(prototypes)
        first, second = (
            Teacher(z, teacher_keys, shift, _TEACHER_TEMPERATURE) for z in (teacher_crops, teacher_tokens[None])
        )
        comparisons = [dino(crops, first), ibot(tokens, second, weights=weights, num_crops=2 * size)]
        return cross_entropy(comparisons, keys, temperature=_TEMPERATURE, fused=fused)[0]

    def plain() -> Tensor:
        student, masked = ((z @ keys.T / _TEMPERATURE).log_softmax(dim=-1) for z in (crops, tokens))
        teachers = ((z @ teacher_keys.T / _TEACHER_TEMPERATURE) for z in (teacher_crops, teacher_tokens))
        q, masked_q = (scores.softmax(dim=-1) for scores in teachers)
        pairs = [(q[t] * student[v]).sum(dim=-1).mean() for t in range(2) for v in range(len(student)) if v != t]
        return -torch.stack(pairs).mean() - ((masked_q * masked).sum(dim=-1) * weights).sum() / (2 * size)

    losses: dict[str, Callable[[], Tensor]] = {OURS: ours}
    if compiled:
        losses[COMPILED] = partial(ours, True)
    if lightly:
        module = importlib.import_module("lightly.loss")
        on_crops = module.DINOLoss(output_dim=prototypes, student_temp=_TEMPERATURE).to(device)
        on_tokens = module.IBOTPatchLoss(output_dim=prototypes, student_temp=_TEMPERATURE).to(device)

        def theirs() -> Tensor:
            for loss in (on_crops.center, on_tokens.center.center):
                loss.zero_()  # as in the first step
            scores, teachers = [crops @ keys.T, tokens @ keys.T], [teacher_crops @ teacher_keys.T]
            teachers.append(teacher_tokens @ teacher_keys.T)
            warm = {"teacher_temp": _TEACHER_TEMPERATURE}
            return on_crops(list(teachers[0]), list(scores[0]), **warm) + on_tokens(
                teachers[1], scores[1], mask.view(-1, _GRID, _GRID), **warm
            )

        losses[LIGHTLY] = theirs
    losses[PLAIN] = plain
    return {name: partial(_gradients, loss, inputs) for name, loss in losses.items()}


def _sinkhorn(size: int, *, device: torch.device, lightly: bool, prototypes: int, compiled: bool) -> dict[str, Step]:
    unit = _unit(device)
    tokens, keys = unit(size * _MASKED), unit(prototypes)
    few = slice(0, 16)  # tokens whose targets are compared: ours are made tile by tile when they are needed

    @torch.no_grad()
    def ours(fused: bool = False) -> list[Tensor]:
        shift = sinkhorn_log_scaling([tokens], keys, temperature=_TEACHER_TEMPERATURE, world=World(), fused=fused)
        return [(tokens[few] @ keys.T / _TEACHER_TEMPERATURE + shift).softmax(dim=1)]

    @torch.no_grad()
    def plain() -> list[Tensor]:
        q = (tokens @ keys.T).float().div_(_TEACHER_TEMPERATURE).exp_()
        for _ in range(3):
            q /= q.sum(dim=0)
            q /= q.sum(dim=1, keepdim=True)
        return [q[few].clone()]

    steps: dict[str, Step] = {OURS: ours}
    if compiled:
        steps[COMPILED] = partial(ours, True)
    if lightly:
        theirs = importlib.import_module("lightly.loss.swav_loss").sinkhorn
        steps[LIGHTLY] = lambda: [
            theirs((tokens @ keys.T).float(), iterations=3, epsilon=_TEACHER_TEMPERATURE)[few].clone()
        ]
    steps[PLAIN] = plain
    return steps


def _gradients(loss: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(), inputs))


# ---------------------------------------------------------------------- memory


def _peak(step: Step, device: torch.device) -> tuple[int | None, list[Tensor]]:
    """Most bytes beside what there was before that a step holds at once, and what it returns."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it counts when it is taken again
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is that from now on
    except (AttributeError, OSError):
        return None, step()
    before = _status("VmRSS")
    result = step()
    return _status("VmHWM") - before, result


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


# ---------------------------------------------------------------------- for people


def as_table(result: dict[str, Any]) -> Table:
    """A row a contender."""
    what = {
        "simclr": "NT-Xent of {embeddings:,} embeddings of {width} at {temperature:g}",
        "dinov2": "DINO and iBOT of {size:,} images and {prototypes:,} prototypes",
        "sinkhorn": "targets of {tokens:,} masked patches and {prototypes:,} prototypes",
    }[result["method"]]
    numbers = {"embeddings": 2 * result["size"], "tokens": _MASKED * result["size"]}
    title = what.format(**{"prototypes": 0, **numbers, **result})
    where = result["device"] if result["device"] != "cpu" else f"cpu, {result['threads']} threads"
    passes = "without gradient" if result["method"] == "sinkhorn" else "forward and backward"
    table = Table(title=f"{title}, {result['precision']}, {passes} ({where})", title_justify="left")
    table.add_column("by")
    reference = "ours" if result["reference"] == OURS else result["reference"]
    for column in ("seconds", "× ours", "CPU s", "peak MB", f"result, from {reference}"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        if "missing" in row:
            table.add_row(row["name"], row["missing"], style="dim")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.1f}"
        times = f"{row['seconds']:.3f}", f"{row['times']:.1f}", f"{row['cpu_seconds']:.3f}"
        table.add_row(row["name"], *times, peak, f"{row['difference']:.0e}")
    return table


def as_lines(result: dict[str, Any]) -> Iterator[str]:
    """What it means in words."""
    mine, *others = (row for row in result["rows"] if "missing" not in row)
    for row in others:
        share = "" if row["peak_bytes"] is None else f", {100 * mine['peak_bytes'] / row['peak_bytes']:.1f} % of memory"
        yield f"ours, against {row['name']}: {row['times']:.1f} times as fast{share}"
