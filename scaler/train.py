"""Train a model: recipe → objects → loop.

    python -m scaler.train dinov2/demo data.shards=shards/train
    torchrun --nproc-per-node 8 -m scaler.train configs/dinov2/vitl16_in1k.yaml data.shards=…
    accelerate launch --config_file configs/accelerate/fsdp2.yaml -m scaler.train dinov2/demo data.shards=…

Exit codes: 0 the run is done (or reached run.stop_after, or the end of evaluate.patience), 75 a signal (or the end of
its launcher) stopped it after a checkpoint (start it again to go on), 2 wrong use, 1 failure. RUN/exit.json says the
same in words.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import yaml

from scaler.announce import announce
from scaler.checkpoint import Checkpointer, Location, load_pieces, locate, read_manifest
from scaler.collectives import World
from scaler.data import TrainingData, check_decoding, open_data
from scaler.layout import Layout, batch_layout, elastic_layouts
from scaler.loop import NonFinite, Plan, Progress, train
from scaler.machine import MachineMeter
from scaler.methods import method_class
from scaler.methods.base import Method
from scaler.metrics import MetricsLog
from scaler.optimizers import build_optimizer
from scaler.recipe import Recipe, StrategySettings, load_recipe
from scaler.rejections import Rejections
from scaler.resume import check_continues
from scaler.run_directory import run_directory, write_exit
from scaler.signals import StopSignals
from scaler.strategies import Strategy, strategy_class
from scaler.strategies.fsdp2 import shard_width
from scaler.strategies.launcher import resolve_strategy
from scaler.strategies.processes import Meeting, dismiss, join, meet, ranks_per_node, wait_for_end
from scaler.throughput import Supply
from scaler.timetable import Timetable, batch_sizes
from scaler.validation import Validation
from scaler.watch import Watch
from scaler.weights import read_weights
from shards.index import ShardIndex

EXIT_CODES = {
    "done": 0,
    "stop_after": 0,
    "patience": 0,
    "signal": 75,
    "error": 1,
}  # 75 is EX_TEMPFAIL of sysexits.h: try again later


def main(argv: list[str] | None = None) -> int:
    """Run `python -m scaler.train RECIPE [key=value …]`; returns the exit code."""
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        recipe = load_recipe(arguments[0], overrides=arguments[1:])
    except ValueError as error:
        return _fail(error, code=2)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    try:
        code = EXIT_CODES[run(recipe)]
    except (ValueError, OSError) as error:
        code = _fail(error, code=1)
    except Exception as error:
        if alone:
            raise
        traceback.print_exc()
        code = _fail(error, code=1)
    finally:
        if alone and dist.is_initialized():
            dist.destroy_process_group()
    if code == EXIT_CODES["error"] and not alone:  # at once: an orderly end would wait for ranks that are still working
        sys.stdout.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def run(recipe: Recipe) -> str:
    """Run a recipe in this process and its peers; returns why it ended (a key of `EXIT_CODES`).

    Raises:
        ValueError: the recipe, the data, the launcher and the machine do not fit together; says how to mend it.
    """
    settings = resolve_strategy(recipe.strategy)
    make_deterministic(recipe.run.deterministic)
    run_dir, minutes = Path(recipe.run.dir), recipe.run.timeout_minutes
    with Watch(timeout=60 * minutes, rank=int(os.environ.get("RANK", "0"))) as watch:
        meeting = meet(say=watch.beat)
        with run_directory(run_dir, rank=meeting.rank), said_where(watch):
            layouts = choose_layouts(recipe, settings, meeting=meeting)
            ranks = layouts[recipe.data.global_batch_size].ranks
            if meeting.rank >= ranks:
                watch.share(rank=meeting.rank, world_size=1, store=None, folder=run_dir)
                return wait_for_end(meeting, tick=lambda: watch.beat("idle"))
            # Twice the watch's time: it is to speak first, also when a slow rank begins to hang late.
            world, device = join(meeting, ranks=ranks, timeout_minutes=2 * minutes + 1)
            watch.share(
                rank=world.rank,
                world_size=world.size,
                store=meeting.store,
                folder=run_dir,  # held by rank 0, without whom nobody has joined
                on_end=lambda line: write_exit(run_dir, reason="error", error=line) if world.rank == 0 else None,
            )
            reason, signals = "error", StopSignals()
            try:
                for left in range(recipe.run.max_rewinds, -1, -1):
                    try:
                        reason = attempt(
                            recipe,
                            settings,
                            layouts=layouts,
                            started=meeting.size,
                            signals=signals,
                            watch=watch,
                            world=world,
                            device=device,
                        )
                        break
                    except NonFinite as error:
                        if not left:
                            again = " (also after going back to the last checkpoint)" * bool(recipe.run.max_rewinds)
                            raise ValueError(f"{error}{again}") from None
                        if world.rank == 0:
                            print(f"{error}. Going back to the last checkpoint, in case it was a passing fault")
                    gc.collect()  # the model, before it is built again
            finally:
                dismiss(meeting, ranks=ranks, reason=reason)
        return reason


def attempt(
    recipe: Recipe,
    settings: StrategySettings,
    *,
    layouts: dict[int, Layout],
    started: int,
    signals: StopSignals,
    watch: Watch,
    world: World,
    device: torch.device,
) -> str:
    """Build everything, go on from the newest checkpoint if there is one, and train; returns why it ended.

    Raises:
        NonFinite: too many steps in a row; another attempt goes on from the last checkpoint.
        ValueError: see `run`.
    """
    run_dir = Path(recipe.run.dir)
    watch.beat("reading the index")
    data = open_data(recipe)
    check_decoding(recipe, device)
    timetable = Timetable(recipe, num_samples=data.num_samples)

    watch.beat("looking for checkpoints")
    keep_every = recipe.checkpoint.keep_every
    checkpointer = Checkpointer(
        run_dir,
        world=world,
        keep_last=recipe.checkpoint.keep_last,
        keep=(lambda step: timetable.due(keep_every, step)) if keep_every else None,
        folder=recipe.checkpoint.dir,
    )
    source = find_start(recipe, checkpointer)

    watch.beat("building the model")
    method = build_method(recipe, world=world)
    data.check(method)
    for layout in layouts.values():
        method.check_layout(num_micro_batches=layout.num_micro_batches, micro_batch_size=layout.micro_batch_size)
    for stage in timetable.stages:
        method.views_at(stage.image_size)
    watch.beat("loading weights")
    begun = method.load_weights(read_weights) if source is None else []
    strategy = strategy_class(settings.name)(
        settings, world=world, device=device, clip_norm=recipe.optim.clip_norm, deterministic=recipe.run.deterministic
    )
    strategy.prepare(method, lambda: build_optimizer(recipe.optim, method.parameter_groups(recipe.optim)))

    layout = layouts[recipe.data.global_batch_size]
    validation = open_validation(recipe, data, method, strategy, layout=layout, world=world, device=device)
    if validation is not None:
        begun.append(validation.describe())
    resolved = resolved_recipe(recipe, shards=data.place, settings=settings)
    progress = Progress()
    if source is not None:
        manifest = read_manifest(source)
        check_continues(
            manifest,
            recipe=resolved,
            fingerprint=data.fingerprint,
            allowed=recipe.checkpoint.allow_changes,
            path=source,
        )
        watch.beat("loading the checkpoint")
        load_pieces(source, strategy.pieces())
        strategy.loaded()
        strategy.loss_scale.load_state_dict(manifest["loss_scale"])
        progress = Progress(step=manifest["step"], images=manifest["images"])
        if validation is not None and manifest.get("validation"):
            validation.load_state_dict(manifest["validation"])
    if world.rank == 0:
        (run_dir / "recipe.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False, width=100))

    drawn = data.num_samples or timetable.images(timetable.total)
    rejections = Rejections(world=world, limit=max(10, int(recipe.data.max_bad_fraction * drawn)))
    log = MetricsLog(
        run_dir,
        rank=world.rank,
        start_step=progress.step,
        total_steps=timetable.total,
        track=recipe.track,
        recipe=resolved,
        supply=Supply(
            num_workers=recipe.data.num_workers,
            processes=ranks_per_node(world.size),
            remote=data.remote,
            gpu=device.type == "cuda",
            decode=recipe.data.decode,
        ),
        symptoms=method.symptoms,
    )
    rejections.load(run_dir / "rejected.jsonl")
    watch.beat("starting")
    machine = MachineMeter(device, num_gpus=ranks_per_node(world.size))
    try:
        if machine.problem is not None:
            log.note(f"GPU utilisation cannot be measured: {machine.problem}")
        announce(
            log,
            strategy.report(),
            recipe=recipe,
            method=method,
            data=data,
            timetable=timetable,
            layouts=layouts,
            started=started,
            begun=begun,
            source=source,
            progress=progress,
        )
        reason = train(
            plan=make_plan(recipe, timetable=timetable, layouts=layouts),
            progress=progress,
            method=method,
            strategy=strategy,
            loader=data.batches(
                method, timetable=timetable, layouts=layouts, world=world, step=progress.step, images=progress.images
            ),
            validation=validation,
            checkpointer=checkpointer,
            checkpoint_info=lambda: {
                "images": progress.images,
                "recipe": resolved,
                "fingerprint": data.fingerprint,
                "loss_scale": strategy.loss_scale.state_dict(),
                "saved_by": strategy.report(),
                "validation": None if validation is None else validation.state_dict(),
            },
            rejections=rejections,
            log=log,
            machine=machine,
            signals=signals,
            watch=watch,
            world=world,
            device=device,
        )
        log.note(
            {
                "done": "done",
                "signal": "stopped by a signal; start again to go on",
                "stop_after": "reached run.stop_after",
                "patience": "no better evaluation for evaluate.patience times",
            }[reason]
            + f": step {progress.step}, {run_dir}"
        )
        if validation is not None and validation.best is not None:
            best = ", ".join(f"{name} {value:.4g}" for name, value in validation.best.items())
            log.note(f"best evaluation: {best}")
    finally:
        machine.close()
        log.close()
    if world.rank == 0:
        write_exit(run_dir, reason=reason, step=progress.step, images=progress.images)
    return reason


# ---------------------------------------------------------------------- parts that other commands use too


def build_method(recipe: Recipe, *, world: World) -> Method:
    """The recipe's method, initialised from its seed: the same on every rank and machine layout."""
    torch.manual_seed(recipe.run.seed)
    return method_class(recipe.method.name)(recipe.method, image_size=recipe.data.image_size, world=world)


# ---------------------------------------------------------------------- helpers of `run`


@contextlib.contextmanager
def said_where(watch: Watch) -> Iterator[None]:
    """What goes wrong without being the user's mistake (a peer that is gone) says on which rank and in which phase."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(f"{watch.where()}: {first}") from error


def choose_layouts(recipe: Recipe, settings: StrategySettings, *, meeting: Meeting) -> dict[int, Layout]:
    """How each global batch size of the run is laid over those who met: over all, or with `strategy.min_ranks` over as
    many as can.

    Raises:
        ValueError: it cannot; says how it could.
    """
    sizes, micro = batch_sizes(recipe), settings.micro_batch_size
    if settings.min_ranks is None or meeting.store is None:
        return {size: batch_layout(size, micro_batch_size=micro, ranks=meeting.size) for size in sizes}
    method = build_method(recipe, world=World())

    def check(layout: Layout) -> None:
        method.check_layout(num_micro_batches=layout.num_micro_batches, micro_batch_size=layout.micro_batch_size)
        if settings.name == "fsdp2":
            shard_width(settings.shard_group, world_size=layout.ranks)

    return elastic_layouts(
        sizes, micro_batch_size=micro, started=meeting.size, min_ranks=settings.min_ranks, check=check
    )


def make_plan(recipe: Recipe, *, timetable: Timetable, layouts: dict[int, Layout]) -> Plan:
    """What the loop does when."""
    every = recipe.checkpoint.every
    by_clock = every.endswith(" minutes")
    return Plan(
        timetable=timetable,
        layouts=layouts,
        log_every=recipe.track.log_every,
        save_every=None if by_clock else every,
        save_minutes=float(every.removesuffix(" minutes")) if by_clock else 0.0,
        seed=recipe.run.seed,
        max_nonfinite=recipe.run.max_nonfinite,
    )


def open_validation(
    recipe: Recipe,
    data: TrainingData,
    method: Method,
    strategy: Strategy,
    *,
    layout: Layout,
    world: World,
    device: torch.device,
) -> Validation | None:
    """The evaluation that the recipe asks for, if any.

    Raises:
        ValueError: there is no such thing, or its classes are others than the training's; says how to mend it.
    """
    if recipe.data.val_shards is None:
        return None
    index = ShardIndex.load(recipe.data.val_shards, cache=recipe.data.cache())
    if not index.class_names:
        raise ValueError(
            f"{index.path} (data.val_shards) has no labels, and only labelled images can be scored; convert from a "
            "folder of class folders, or leave data.val_shards out"
        )
    labelled = bool(data.class_names) or method.validates
    if labelled and data.class_names is not None and index.class_names != data.class_names:
        raise ValueError(
            f"{index.path} (data.val_shards) has {len(index.class_names)} classes and {data.place} has "
            f"{len(data.class_names)}, or others: labels would not mean the same; convert both from class folders of "
            "the same names"
        )
    if data.class_names is None and recipe.evaluate.every is None:
        raise ValueError("a stream (data.reader) has no epochs: set evaluate.every in steps or images")
    method.check_classes(index.class_names)
    batch_size = recipe.evaluate.batch_size or layout.micro_batch_size
    return Validation(
        recipe,
        index=index,
        train=data.index if data.class_names else None,
        method=method,
        strategy=strategy,
        batch_size=batch_size,
        world=world,
        device=device,
    )


def find_start(recipe: Recipe, checkpointer: Checkpointer) -> Location | None:
    """The checkpoint to start from: the run's own newest, else the one that `checkpoint.resume` names.

    Raises:
        ValueError: `resume: never` in a directory that holds checkpoints, or a named checkpoint that is damaged.
    """
    resume = recipe.checkpoint.resume
    own = checkpointer.find()
    if resume == "never" and own is not None:
        raise ValueError(
            f"{recipe.run.dir} already holds {own.name} and checkpoint.resume is never; choose another "
            "run.dir, or remove the old run"
        )
    if own is not None or resume in ("auto", "never"):
        return own
    return checkpointer.named(resume)


def resolved_recipe(recipe: Recipe, *, shards: str, settings: StrategySettings) -> dict[str, Any]:
    """The recipe with every default and "auto" written out and full paths of shards and checkpoints, as plain data."""
    values = recipe.model_dump(mode="json")
    values["strategy"] = settings.model_dump(mode="json")
    values["data"]["shards"] = shards
    if recipe.data.val_shards is not None:
        values["data"]["val_shards"] = str(locate(recipe.data.val_shards))  # which leaves out what may be secret
    if recipe.checkpoint.dir is not None:
        place = locate(recipe.checkpoint.dir)
        values["checkpoint"]["dir"] = str(place.resolve() if isinstance(place, Path) else place)
    return values


def make_deterministic(deterministic: bool) -> None:
    """Ask torch for deterministic kernels (slower); without it results are equal up to rounding only, and convolutions
    are those that were fastest when tried.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _fail(error: Exception, *, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


class _Callable(ModuleType):
    """This module, which notebooks call as a function: `scaler.train("dinov2/demo", …)`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """See `scaler.notebook.train`."""
        from scaler.notebook import train as train_here

        return train_here(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
