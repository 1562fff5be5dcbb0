"""Nothing in a training step waits for the device, and a logged step does once: on a GPU that is not there."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaler.bench.stepper import Stepper, noise
from scaler.collectives import World
from scaler.loop import read_metrics
from scaler.methods.supervised.augment import erase_
from scaler.methods.supervised.mixing import make_mixup, mix_
from scaler.methods.supervised.settings import SupervisedSettings
from scaler.optimizers import build_optimizer
from scaler.plan.trace import meta_method
from scaler.recipe import load_recipe
from scaler.strategies.ddp import DDP
from tests.fake_cuda import fake_batch, fake_cuda, to_fake_cuda

STEPS = {
    "sinkhorn": [
        "dinov2/demo", "strategy.precision=bf16", "method.drop_path=0.3", "method.blur_kernel=3",
        "method.solarize_probability=0.5", "strategy.activation_checkpointing=selective",
    ],
    "centred": [
        "dinov2/demo", "strategy.precision=fp32", "method.centering=softmax", "method.separate_heads=true",
        "method.gram_weight=1", "method.gram_teacher=self", "method.gram_start=1 steps", "method.gram_size_factor=2",
    ],
    "simclr": ["simclr/demo", "strategy.precision=fp16", "optim.name=lars", "method.blur_probability=0.5"],
    "supervised": [
        "supervised/demo", "strategy.precision=bf16", "optim.name=sgd", "method.drop_path=0.1", "method.group_size=4",
        "method.cutmix=1", "method.erase_probability=0.3", "method.ema=0.9",
    ],
    "resnet": [
        "supervised/demo", "strategy.precision=bf16", "optim.name=lars", "method.backbone=resnet18",
        "method.patch_size=null", "method.depth=null", "method.embed_dim=null", "method.num_heads=null",
        "method.initial_weights=published", "method.group_size=8", "method.mixup=1", "method.cutmix=1",
        "method.mix_by=pair",
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_a_gpu_waits_for_nothing_and_a_logged_one_once(monkeypatch, name):
    recipe, world = load_recipe(STEPS[name][0], overrides=["method.depth=1", *STEPS[name][1:]], shards="none"), World()
    method = meta_method(recipe, world=world)
    batches = [noise(method, 8, world=world, device=torch.device("cpu"), number=i, count=2) for i in range(2)]
    with fake_cuda(monkeypatch) as gpu:
        to_fake_cuda(method)
        monkeypatch.setattr(method, "to", lambda device: method, raising=False)  # it is there
        strategy = DDP(recipe.strategy, world=world, device=torch.device("cuda"), clip_norm=1.0, deterministic=False)
        strategy.prepare(method, lambda: build_optimizer(recipe.optim, method.parameter_groups(recipe.optim)))
        stepper = Stepper(recipe, method, strategy, world=world, batches=[fake_batch(batch) for batch in batches])
        gpu.waits.clear()
        metrics, result = stepper.step()
        assert gpu.waits == []
        read_metrics(metrics, {"grad_norm": result.grad_norm, **result.module_norms}, 0, world)
        assert len(set(gpu.waits)) == 1  # a list is read element by element here
    if name == "simclr" and find_spec("triton"):
        assert {"scaler::nt_xent_sums", "scaler::nt_xent_weighted"} <= gpu.own
    assert all(p.device.type == "cuda" for p in method.parameters()) and metrics[0]["loss"].device.type == "cuda"


@pytest.mark.parametrize("mix_by", ["group", "pair", "image"])
def test_mixing_and_erasing_are_as_few_operations_for_any_number_of_groups(monkeypatch, mix_by):
    mixup = make_mixup(SupervisedSettings(num_classes=9, mixup=1.0, cutmix=1.0, mix_by=mix_by, group_size=4))
    counts = []
    for m in (16, 64):
        numbers = torch.arange(m)
        with fake_cuda(monkeypatch) as gpu, Launches() as launches:
            images = torch.empty(m, 3, 32, 32, device="cuda")
            launches.count = 0
            erase_(images, {"ids": numbers, "epochs": numbers}, probability=0.5, seed=0)
            where = {"positions": numbers, "group_size": 4, "seed": 0, "step": 0}
            assert mix_(mixup, images, numbers % 9, **where).shape == (m, 9)
        assert gpu.waits == []
        counts.append(launches.count)
    assert counts[0] == counts[1] < 20, counts


class Launches(TorchDispatchMode):
    """Counts operations on the GPU that are neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in tree_leaves((args, kwargs, out)))
        self.count += on_gpu and str(func).startswith("aten") and not func.is_view and "empty" not in str(func)
        return out


def test_what_waits_is_seen(monkeypatch):
    with fake_cuda(monkeypatch) as gpu:
        x = torch.zeros(8, device="cuda")
        (x + 1).mul_(2).sum()
        torch.zeros(4).pin_memory().to("cuda", non_blocking=True)
        torch.full((3,), 2.0, device="cuda")
        torch.where(x > 0, x, 0.0)
        assert gpu.waits == []
        waiting = {
            "item": lambda: x.sum().item(),
            "truth": lambda: bool((x > 0).any()),
            "list": lambda: x.tolist(),
            "rows": lambda: x[x > 0],
            "where": lambda: torch.nonzero(x),
            "back": lambda: x.cpu(),
            "pageable": lambda: torch.zeros(4).to("cuda", non_blocking=True),
            "blocking": lambda: torch.zeros(4).pin_memory().to("cuda"),
            "made": lambda: torch.tensor([1.0, 2.0], device="cuda"),
            "like": lambda: x.new_tensor([1.0, 2.0]),
            "host index": lambda: x[torch.tensor([1, 2])],
            "equal": lambda: torch.equal(x, x),
        }
        for name, wait in waiting.items():
            gpu.waits.clear()
            with contextlib.suppress(DynamicOutputShapeException, DataDependentOutputException):
                wait()
            assert gpu.waits, name
