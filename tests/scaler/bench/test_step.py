"""`scaler bench step`: the reference computes what ours does, operations are counted as by hand, rows say what ran."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from scaler.bench.flops import best_matmul_rate, model_flops
from scaler.bench.parts import NAMES
from scaler.bench.references.dinov2 import DINOv2Reference
from scaler.bench.step import combinations, measure
from scaler.bench.step_contenders import OURS, REFERENCE, SEPARATE, separate_
from scaler.bench.step_text import as_lines, as_table
from scaler.bench.stepper import noise
from scaler.bench.trace import idle_share, kind
from scaler.collectives import World
from scaler.methods.base import Batch, Hyper
from scaler.recipe import Recipe, load_recipe
from scaler.timetable import Timetable
from scaler.train import build_method
from tests.long import only_long
from tests.runs import make_shards
from tests.scaler.test_cli import scaler

CPU = torch.device("cpu")
M = 8


def demo(*overrides: str) -> Recipe:
    return load_recipe("dinov2/demo", overrides=[f"data.global_batch_size={M}", *overrides], shards="none")


def step_inputs(recipe: Recipe, method: Any) -> tuple[Batch, Hyper]:
    raw = noise(method, M, world=World(), device=CPU)
    hyper = Timetable(recipe, num_samples=1000).hyper(method, 0)
    return method.augment(raw, seed=0, step=0), hyper


def learned(recipe: Recipe, *, separate: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Our loss, and the student's gradients by name."""
    method: Any = build_method(recipe, world=World())
    if separate:
        separate_(method)
    batch, hyper = step_inputs(recipe, method)
    with torch.no_grad():
        (target,) = method("combine", [method("observe", batch, hyper)], hyper)
    loss = method("learn", batch, target, hyper)["loss"]
    loss.backward()
    return loss.detach(), gradients(method.student)


def gradients(student: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    a, b = (torch.cat([found[name].flatten() for name in mine]) for found in (mine, theirs))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method.centering=softmax", "method.separate_heads=true", "method.registers=2", "method.layer_scale=0.1"],
        ["method.group_size=4", "method.num_local_crops=0", "method.koleo_weight=1"],
    ],
)
def test_the_plain_computation_has_our_loss_and_gradients(overrides: list[str]) -> None:
    recipe = demo(*overrides)
    loss, mine = learned(recipe, separate=False)
    reference = DINOv2Reference(recipe, precision="fp32", device=CPU)
    batch, hyper = step_inputs(recipe, reference.method)
    plain = reference.loss(batch, hyper=hyper)
    plain.backward()
    torch.testing.assert_close(plain.detach(), loss, rtol=1e-5, atol=0)
    assert difference(gradients(reference.student), mine) < 1e-5


def test_the_packed_pass_is_equal_to_separate_ones() -> None:
    recipe = demo("method.drop_path=0.4", "method.layer_scale=0.1")
    (loss, mine), (other, theirs) = (learned(recipe, separate=kind) for kind in (False, True))
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
    assert difference(mine, theirs) < 1e-5


def test_the_plain_step_trains_and_its_teacher_follows() -> None:
    recipe = demo("method.drop_path=0.2")
    reference = DINOv2Reference(recipe, precision="bf16", device=CPU)
    before = [p.clone() for p in reference.teacher.parameters()]
    marks: list[str] = []
    batches = iter([[noise(reference.method, M, world=World(), device=CPU)]])
    reference.optimizer.param_groups[0]["lr_scale"] = 1.0
    reference.number = 40  # the warm-up is over
    reference.step(batches, marks.append)
    assert marks == [*NAMES, "end"]
    moved = [not torch.equal(p, q) for p, q in zip(reference.teacher.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2


def by_hand(recipe: Recipe) -> float:
    """Of the demo's ViT and heads, with as many masked tokens as its masks have."""
    s, size = recipe.method, recipe.data.image_size
    d, h, b, p = s.embed_dim, s.head_hidden, s.head_bottleneck, s.patch_size
    batch, _ = step_inputs(recipe, build_method(recipe, world=World()))
    masked = len(batch["masked"])

    def vit(crops: int, pixels: int) -> tuple[float, float]:
        patches = (pixels // p) ** 2
        tokens = patches + 1
        return crops * s.depth * tokens * (24 * d * d + 4 * tokens * d), crops * patches * 2 * 3 * p * p * d

    def head(rows: int) -> float:
        return rows * 2 * (d * h + h * h + h * b + b * s.num_prototypes)

    global_, stem = vit(2 * M, size)
    local, local_stem = vit(s.num_local_crops * M, s.local_size)
    teacher = global_ + stem + head(2 * M + masked)
    student = global_ + local + head((2 + s.num_local_crops) * M + masked)
    return teacher + 3 * student + 2 * (stem + local_stem)  # pixels need no gradient


def test_operations_are_those_of_the_formulas() -> None:
    recipe = demo()
    assert model_flops(recipe, micro_batch_size=M) == pytest.approx(by_hand(recipe), rel=2e-3)
    dropped = model_flops(demo("method.drop_path=0.5"), micro_batch_size=M)
    checkpointed = demo("strategy.activation_checkpointing=blocks", "method.drop_path=0.5")
    assert dropped == model_flops(checkpointed, micro_batch_size=M) < 0.9 * by_hand(recipe)
    assert best_matmul_rate(CPU, torch.float32, seconds=0.0) > 1e8


def test_rows_of_those_compared(tmp_path: Path) -> None:
    trace = tmp_path / "step.json.gz"
    result = measure("dinov2/demo", images=M, compare=True, trace_to=trace, seconds=0.001, rounds=2)
    rows = {row["name"]: row for row in json.loads(json.dumps(result))["rows"]}
    assert list(rows) == [OURS, SEPARATE, REFERENCE]
    for row in rows.values():
        assert list(row["parts"]) == list(NAMES.values())
        assert sum(row["parts"].values()) == pytest.approx(row["step_seconds"], rel=0.5)
        assert row["images"] == M and row["steps"] == 2 and row["peak_bytes"] > 1e6
        assert row["mfu"] == row["mfu_all_rows"] > 0  # the demo has no drop path
        assert row["model_flops"] / row["matmul_flops"] / row["mfu"] == pytest.approx(M / row["images_per_second"])
    assert rows[REFERENCE]["ours_times_as_fast"] > 0 < rows[REFERENCE]["our_share_of_memory"]
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert rows[OURS]["profile"]["seconds_by_kind"]["matrix products"] > 0
    text = said(result)
    assert "ours, against 3, reference: " in text and "in it the host" in text and "heads and losses" in text


def test_rows_of_variants_on_real_images(tmp_path: Path) -> None:
    result = measure(
        "dinov2/demo",
        overrides=[f"data.shards={make_shards(tmp_path)}", "data.num_workers=0", "strategy.micro_batch_size=8"],
        images=2 * M,
        data="real",
        vary=["strategy.precision=bf16,fp64", "strategy.name=fsdp2"],
        seconds=0.001,
        rounds=2,
    )
    row, failed = result["rows"]
    assert row["variant"] == {"strategy.precision": "bf16", "strategy.name": "fsdp2"}
    assert row["images"] == 2 * M and row["parts"]["data"] > 1e-3  # cutting crops takes time
    assert row["model_flops"] == pytest.approx(2 * by_hand(demo()), rel=2e-2)
    assert "strategy.precision" in failed["failed"] and f"2, {OURS}: " in said(result)


def said(result: dict[str, Any]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(as_table(result))
    return "\n".join([console.export_text(), *as_lines(result)])


def test_wrong_use_is_told() -> None:
    with pytest.raises(ValueError, match="no data 'fake'"):
        measure("dinov2/demo", data="fake")
    with pytest.raises(ValueError, match="leave out --vary, or --trace"):
        measure("dinov2/demo", vary=["optim.lr=1,2"], trace_to=Path("t"))
    with pytest.raises(ValueError, match="not KEY=VALUE,VALUE"):
        measure("dinov2/demo", vary=["optim.lr"])
    with pytest.raises(ValueError, match="whole groups"):
        measure("dinov2/demo", images=7)
    assert list(combinations(["a=1,2", "b=x"])) == [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]
    assert list(combinations([])) == [{}]


def test_kernels_have_kinds_and_gaps_are_idle() -> None:
    names = {
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT": "matrix products",
        "void flash_fwd_kernel<Flash_fwd_kernel_traits>": "attention",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": "collectives",
        "triton_per_fused_add_native_layer_norm_0": "compiled",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>": "softmax and norms",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>": "optimiser and EMA",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float> >": "element by element",
        "aten::addmm": "matrix products",
        "something": "other",
    }
    assert {name: kind(name) for name in names} == names
    assert idle_share([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == pytest.approx(2 / 6)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "made" / "result.json"
    words = [
        "--images",
        "8",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--compare",
        "--out",
        str(out),
        "strategy.precision=bf16",
    ]
    done = scaler("bench", "step", "simclr/demo", *words)
    assert done.returncode == 0 and "heads and losses" in done.stdout
    result = json.loads(out.read_text())
    assert {"date", "cpu", "packages", "git", "command"} <= result.keys()
    row, other = result["rows"]
    assert row["steps"] == 1 and result["recipe"]["strategy"]["precision"] == "bf16"
    assert other["name"] == REFERENCE and other["ours_times_as_fast"] > 0 and "timm's vit_tiny" in other["made_of"]


@only_long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_several_processes_measure_together(strategy: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ["--images", "8", "--processes", "2", "--steps", "2", "--rounds", "1", f"strategy.name={strategy}"]
    assert scaler("bench", "step", "dinov2/demo", "--out", str(out), *words).returncode == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["profile"]["collective_seconds"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_by_its_own_events() -> None:
    overrides = ["strategy.precision=bf16", "strategy.compile=true"]
    result = measure("dinov2/demo", overrides=overrides, images=M, compare=True, seconds=0.2, rounds=2)
    for row in result["rows"]:
        assert 0 < row["mfu"] < 1 and row["peak_bytes"] > 1e6
        assert sum(row["parts"].values()) == pytest.approx(M / row["images_per_second"], rel=0.2)
