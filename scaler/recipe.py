"""The recipe: one YAML file that says everything that affects results, checked before anything starts.

    recipe = load_recipe("dinov2/demo", overrides=["data.shards=shards/train", "schedule.total=20 steps"])

Unknown keys fail with the nearest valid name; overrides are dotted and parsed as YAML. `recipe_schema()` is the JSON
schema for editors.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from scaler.methods import METHODS, method_settings
from scaler.nested import flatten
from scaler.schedules import Duration
from shards.cache import ShardCache
from shards.storage import parse_size


class Section(BaseModel):
    """Base of the recipe's sections: unknown keys are errors and values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _duration(value: Any) -> str:
    return str(Duration.parse(value))


def _interval(value: Any) -> str:
    text = str(value).strip()
    number, _, unit = text.partition(" ")
    if unit in ("minutes", "minute") and number.replace(".", "", 1).isdigit() and float(number) > 0:
        return f"{number} minutes"
    return _duration(value)


def _size(value: Any) -> str:
    parse_size(str(value))
    return str(value)


DurationText = Annotated[str, BeforeValidator(_duration)]
IntervalText = Annotated[str, BeforeValidator(_interval)]
SizeText = Annotated[str, BeforeValidator(_size)]


class DataStage(Section):
    """How the run begins: with another batch or image size than the rest of it."""

    until: DurationText = Field(description="point of the whole run at which the stage ends")
    global_batch_size: int | None = Field(None, gt=0, description="null: data.global_batch_size")
    image_size: int | None = Field(None, gt=0, description="null: data.image_size")

    @model_validator(mode="after")
    def _changes_something(self) -> DataStage:
        if self.global_batch_size is None and self.image_size is None:
            raise ValueError("a stage needs a global_batch_size or an image_size of its own")
        return self


class Data(Section):
    """Where the images come from and how the global batch is drawn (`shards.order`)."""

    shards: str = Field(
        description="folder or URL that holds index.json; with reader stream, shards as webdataset names them: paths "
        "or URLs with braces, several joined by '::', pipe: commands"
    )
    val_shards: str | None = Field(None, description="labelled shards, folder or URL, on which `evaluate` scores")
    reader: Literal["indexed", "stream"] = Field(
        "indexed", description="stream: shards without an index, drawn with replacement, resumed approximately"
    )
    allow_pipes: bool = Field(False, description="reader stream: run the pipe: commands among the shards")
    global_batch_size: int = Field(gt=0, description="images per optimiser step over all ranks and micro-batches")
    num_workers: int = Field(8, ge=0, description="loader processes per rank; of indexed shards never changes results")
    decode: Literal["cpu", "gpu"] = Field(
        "cpu",
        description="who decodes, crops and resizes JPEGs: the loader's workers, or the GPU that trains, by nvJPEG; "
        "pixels differ by some grey levels",
    )
    image_size: int = Field(gt=0, description="pixels of a (global) crop")
    stages: tuple[DataStage, ...] = Field(
        (), description="what the run begins with: batch-size ramp-up, progressive resolution"
    )
    shuffle_window: int = Field(2048, gt=0, description="samples of a lane (of a rank's stream) shuffled together")
    lanes: int | Literal["auto"] = "auto"
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="distinct undecodable samples that stop the run")
    max_pixels: int = Field(100_000_000, gt=0, description="images with more pixels are rejected unread")
    cache_dir: str | None = Field(
        None, description="folder on a local disk for remote shards; null: in the user's cache folder"
    )
    cache_size: SizeText = Field("100GB", description="bytes that the node's cache of remote shards may take")

    @model_validator(mode="after")
    def _decodes_what_it_reads(self) -> Data:
        if self.decode == "gpu" and self.reader == "stream":
            raise ValueError(
                "data.decode=gpu needs data.reader=indexed: what a GPU refuses is read again, and a stream cannot go "
                "back; index the shards (scaler index), or set data.decode=cpu"
            )
        return self

    def changed_keys(self) -> set[str]:
        """Those whose value is not the default."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    def cache(self) -> ShardCache:
        """The node's cache of remote shards."""
        return ShardCache(self.cache_dir, max_bytes=parse_size(self.cache_size))


class Optim(Section):
    """Optimiser; `lr` is the base that `lr_rule` scales by the global batch."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(gt=0)
    lr_rule: Literal["none", "linear_256", "sqrt_1024", "sqrt"] = "none"
    weight_decay: float = Field(0.0, ge=0)
    weight_decay_end: float | None = Field(None, ge=0, description="cosine from weight_decay to this; null: constant")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    eta: float = Field(0.001, gt=0, description="LARS trust coefficient")
    layer_decay: float = Field(1.0, gt=0, le=1)
    patch_embed_lr_scale: float = Field(1.0, ge=0)
    clip_norm: float | None = Field(None, gt=0, description="per module; null: no clipping")

    def scaled_lr(self, global_batch_size: int) -> float:
        """Peak learning rate at this global batch size."""
        factor = {
            "none": 1.0,
            "linear_256": global_batch_size / 256,
            "sqrt_1024": math.sqrt(global_batch_size / 1024),
            "sqrt": math.sqrt(global_batch_size),
        }[self.lr_rule]
        return self.lr * factor


class Schedule(Section):
    """Length of the run and the shape of the learning rate after its linear warm-up."""

    total: DurationText
    warmup: DurationText = "0 steps"
    shape: Literal["cosine", "step", "constant"] = Field(
        "cosine", description="after the warm-up: a cosine to final_lr, times `factor` at each milestone, or the peak"
    )
    final_lr: float = Field(0.0, ge=0)
    milestones: tuple[DurationText, ...] = Field((), description="points of the whole run, for shape step")
    factor: float = Field(0.1, gt=0, lt=1, description="of the learning rate at each milestone, for shape step")

    @model_validator(mode="after")
    def _fits_its_shape(self) -> Schedule:
        readers = {"final_lr": "cosine", "milestones": "step", "factor": "step"}
        for name, shape in readers.items():
            if self.shape != shape and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is read by shape {shape} and has no effect with {self.shape}; leave it out")
        if self.shape == "step" and not self.milestones:
            raise ValueError("shape step needs milestones, for example [30 epochs, 60 epochs]")
        return self


class StrategySettings(Section):
    """How the model is laid over processes; changes speed and memory, not results."""

    name: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: the launcher's, else fp32")
    micro_batch_size: int | None = Field(None, gt=0, description="images per forward and rank; null: no accumulation")
    activation_checkpointing: Literal["none", "selective", "blocks"] | Annotated[int, Field(ge=0)] = Field(
        "none",
        description="for their backward, blocks keep all, selective: the outputs of matrix products and attention, "
        "blocks: their inputs alone; a number: so many blocks their inputs alone, the others all",
    )
    compile: bool = Field(False, description="torch.compile the blocks, each kind of them once")
    fp8: bool = Field(
        False, description="DDP, FSDP2 in bf16: the blocks' linear layers multiply in fp8, for large models on Hopper"
    )
    reshard_after_forward: bool | Annotated[int, Field(gt=1)] = Field(
        True,
        description="FSDP2: free a block's weights after its forward; a number: but keep them among so many ranks "
        "(of a machine), from whom they are gathered for the backward",
    )
    prefetch: int = Field(1, ge=0, description="FSDP2: blocks gathered ahead of the one that runs; 0: as torch does")
    cpu_offload: bool = Field(False, description="FSDP2: keep shards in host memory")
    shard_group: Literal["all", "node"] | Annotated[int, Field(gt=0)] = Field(
        "all", description="FSDP2: ranks that hold one copy of the model between them; fewer than all: hybrid sharding"
    )
    reduce_precision: Literal["fp32", "bf16"] = Field("fp32", description="FSDP2: of gradients on their way")
    static_graph: bool = Field(False, description="DDP: every step uses the same parameters in the same order")
    deepspeed_config: str | dict[str, Any] | None = Field(
        None, description="ZeRO: a DeepSpeed JSON file (or its content) for what a recipe cannot say: offload, buckets"
    )
    min_ranks: int | None = Field(
        None, gt=0, description="train on as many ranks as the batch allows, but not on fewer; null: on all or not"
    )


class Evaluate(Section):
    """Scoring the model on `data.val_shards` while it is trained: a supervised one by its classifier, any other by a
    kNN of its features among training images (among each other where training images have no labels).
    """

    every: DurationText | None = Field(None, description="null: 1 epochs")
    patience: int | None = Field(
        None, gt=0, description="evaluations in a row without a better top-1 that end the run; null: none do"
    )
    batch_size: int | None = Field(None, gt=0, description="images a rank scores at a time; null: its micro-batch")
    crop_fraction: float = Field(0.875, gt=0, le=1, description="of the short side that the centre crop keeps")
    neighbours: int = Field(20_000, gt=0, description="kNN: labelled training images, evenly spread, that may vote")
    k: int = Field(20, gt=0, description="kNN: nearest ones that vote")


class CheckpointSettings(Section):
    """When to save and what to keep."""

    every: IntervalText = "1000 steps"
    keep_last: int = Field(2, gt=0)
    keep_best: bool = Field(True, description="save and keep the checkpoint with the best evaluation")
    keep_every: DurationText | None = None
    dir: str | None = Field(None, description="folder or URL (s3://…) of the checkpoints; null: RUN/checkpoints")
    resume: str = Field("auto", description="auto | never | path of a checkpoint or run (used while RUN has none)")
    allow_changes: tuple[str, ...] = Field((), description="dotted recipe keys (or 'data') that may differ on resume")


class Track(Section):
    """Logging."""

    log_every: DurationText = "10 steps"
    tensorboard: bool = True
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "scaler"
    mlflow: bool = Field(
        False, description="to MLFLOW_TRACKING_URI, or to mlflow.db beside the run directory (scaler[mlflow])"
    )
    mlflow_experiment: str = "scaler"

    @field_validator("log_every")
    @classmethod
    def _steps(cls, value: str) -> str:
        if not value.endswith("steps"):
            raise ValueError(f"{value!r}: logging is counted in steps; write for example '10 steps'")
        return value


class Run(Section):
    """The run directory and what makes the run reproducible."""

    dir: str = Field(
        "runs/NAME", description="NAME: the recipe's; {optim.lr} and the like become their values, for sweeps"
    )
    seed: int = Field(0, ge=0)
    deterministic: bool = False
    stop_after: DurationText | None = Field(None, description="checkpoint and leave at this point of the whole run")
    max_nonfinite: int = Field(10, gt=0, description="non-finite steps in a row that end this attempt")
    max_rewinds: int = Field(1, ge=0, description="times to go back to the last checkpoint after that; then stop")
    timeout_minutes: float = Field(30.0, gt=0, description="without progress on any rank until the run says who hangs")


class Recipe(Section):
    """A whole recipe; `method` is validated by the method's own `Settings`."""

    method: Any
    data: Data
    optim: Optim
    schedule: Schedule
    evaluate: Evaluate = Evaluate()
    strategy: StrategySettings = StrategySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    track: Track = Track()
    run: Run = Run()


def load_recipe(name: str, *, overrides: Sequence[str] = (), shards: str | None = None) -> Recipe:
    """Read a recipe by path or by short name (`dinov2/demo`) and apply dotted overrides (`optim.lr=1e-3`).

    Args:
        shards: `data.shards` where neither says, for commands that can do without images.

    Raises:
        ValueError: file not found, unknown key (with the nearest valid one), wrong type or value.
    """
    path = find_recipe(name)
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping; a recipe has the sections {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _apply(values, override)
    if shards is not None and isinstance(values.get("data"), dict):
        values["data"].setdefault("shards", shards)
    return parse_recipe(values, source=str(path))


def parse_recipe(values: dict[str, Any], *, source: str) -> Recipe:
    """Validate a mapping as a recipe; `source` names it in errors.

    Raises:
        ValueError: one line a problem, each with the dotted key, the rule and, for unknown keys, the nearest name.
    """
    method = _parse_method(values.get("method"), source=source)
    try:
        recipe = Recipe(**{**values, "method": method})
    except ValidationError as error:
        raise ValueError("\n".join(_explain(item, source=source, model=Recipe) for item in error.errors())) from None
    name = "-".join(Path(source).with_suffix("").parts[-2:])
    folder = f"runs/{name}" if recipe.run.dir == "runs/NAME" else _filled_in(recipe.run.dir, recipe, source=source)
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": folder})})


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe for editors. Nothing but `method.name` is required, since what a file leaves out may be
    given on the command line."""
    schema = Recipe.model_json_schema()
    methods = {name: method_settings(name).model_json_schema(ref_template="#/$defs/{model}") for name in METHODS}
    for name, method in methods.items():
        schema["$defs"].update(method.pop("$defs", {}))
        method["properties"]["name"] = {"const": name}  # by which an editor knows which keys are valid
    for part in (schema, *schema["$defs"].values(), *methods.values()):
        part.pop("required", None)
    schema["properties"]["method"] = {"oneOf": [{**method, "required": ["name"]} for method in methods.values()]}
    return schema


def override_words(start: str) -> list[str]:
    """What an override that begins with `start` may become: `section.key=`, or `section.key=value` for each of few."""
    models: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items() if name != "method"}
    found = [
        (f"{section}.{key}", field) for section, model in models.items() for key, field in model.model_fields.items()
    ]
    if start.startswith("method."):
        settings = [method_settings(name) for name in METHODS]
        found += [(f"method.{key}", field) for model in settings for key, field in model.model_fields.items()]
    words = [f"{key}=" for key, _ in found] + ["method."]
    if "=" in start:
        words = [f"{key}={value}" for key, field in found for value in _few(field.annotation)]
    return list(dict.fromkeys(words))


def _few(annotation: Any) -> list[str]:
    """The values of a type that has few."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in _few(part)]


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as a short name, in a checkout as well as installed from a wheel.

    Raises:
        ValueError: no such file and no such recipe; names the nearest one.
    """
    if Path(name).is_file():
        return Path(name)
    stem = name.removesuffix(".yaml").removeprefix("configs/")
    for folder in _config_folders():
        if (folder / f"{stem}.yaml").is_file():
            return folder / f"{stem}.yaml"
    raise ValueError(f"no recipe {name!r}: it is not a file, and {nearest(stem, list(shipped_recipes()))}")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the toolkit, short name → file."""
    return {
        str(path.relative_to(folder).with_suffix("")): path
        for folder in reversed(_config_folders())
        for method in METHODS
        for path in sorted(folder.glob(f"{method}/*.yaml"))
    }


def _config_folders() -> list[Path]:
    """configs/ of a checkout, or as it is installed from a wheel."""
    package = Path(str(resources.files("scaler")))
    return [folder for folder in (package.parent / "configs", package / "configs") if folder.is_dir()]


def nearest(name: str, valid: Sequence[str]) -> str:
    """Advice for an unknown name: the closest valid one, or all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(valid)}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML alone reads `1e-3` as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` inside the nested mapping `values`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} is not key=value, for example optim.lr=1e-3")
    *parents, last = key.strip().lstrip("-").split(".")
    node = values
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None


def _filled_in(text: str, recipe: Recipe, *, source: str) -> str:
    """`text` with every {section.key} as its value in the recipe."""
    values = dict(flatten(recipe.model_dump(mode="json")))

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"{source}: run.dir: no key {match[1]!r} in a recipe; {nearest(match[1], list(values))}")
        return str(values[match[1]]).replace("/", "-").replace(" ", "")

    return re.sub(r"\{([\w.]+)\}", value, text)


def _parse_method(values: Any, *, source: str) -> BaseModel:
    """The `method` section by the method's own Settings."""
    name = values.get("name") if isinstance(values, dict) else None
    if name not in METHODS:
        raise ValueError(f"{source}: method.name: no method {name!r}; {nearest(str(name), list(METHODS))}")
    settings = method_settings(name)
    try:
        return settings(**values)
    except ValidationError as error:
        lines = [_explain(item, source=source, model=settings, prefix="method.") for item in error.errors()]
        raise ValueError("\n".join(lines)) from None


def _explain(item: Any, *, source: str, model: type[BaseModel], prefix: str = "") -> str:
    """One line for one pydantic error: dotted key, what was given, the rule, and the nearest name for unknown keys."""
    path = [str(part) for part in item["loc"]]
    key = prefix + ".".join(path)
    if item["type"] == "extra_forbidden":
        for part in path[:-1]:
            if not part.isdigit():  # the items of a list are all of one kind
                found: Any = model.model_fields[part].annotation
                model = get_args(found)[0] if get_origin(found) is tuple else found
        return f"{source}: unknown key {key!r}; {nearest(path[-1], list(model.model_fields))}"
    if item["type"] == "missing":
        return f"{source}: {key} is missing and has no default"
    message = item["msg"].removeprefix("Value error, ")
    if not path:  # of several keys together, which it names
        return f"{source}: {prefix}{message}"
    return f"{source}: {key}: {message} (got {item['input']!r})"
