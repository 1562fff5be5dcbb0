"""What is printed and run for each kind of launch, read by the launchers' own parsers."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import KINDS, plan, run
from launch.job import Host, Job
from scaler.recipe import StrategySettings
from scaler.strategies.deepspeed_config import merged_config

CONFIGS = Path(__file__).parents[2] / "configs/accelerate"
STRATEGIES = ("ddp", "fsdp2", "fsdp2_hybrid", "zero1", "zero2", "zero3")
HOSTS = (Host("a", 4), Host("b", 4))
WORDS = ["data.shards=a folder", "schedule.total=5 steps"]


def job(**options: Any) -> Job:
    return Job(recipe="dinov2/demo", overrides=tuple(WORDS), **options)


def over_hosts(kind: str, **options: Any) -> Any:
    return plan(kind, job(nodes=2, processes=4, hosts=HOSTS, port=4321, max_restarts=5, **options))


def after(words: list[str], module: str) -> list[str]:
    """The words behind `-m module`."""
    place = words.index(module)
    assert words[place - 2 : place] == [sys.executable, "-m"]
    return words[place + 1 :]


def test_torchrun_on_every_host() -> None:
    from torch.distributed.run import get_args_parser

    launch = over_hosts("torchrun", environment={"A": "b c"})
    assert list(launch.hosts) == ["a", "b"] and launch.command == []
    for number, (name, words) in enumerate(launch.hosts.items()):
        assert words[0] == "env" and "A=b c" in words
        asked = get_args_parser().parse_args(after(words, "torch.distributed.run"))
        assert (asked.nnodes, asked.nproc_per_node, asked.max_restarts, asked.local_addr) == ("2", "4", 5, name)
        assert (asked.rdzv_backend, asked.rdzv_endpoint) == ("c10d", "a:4321")
        assert asked.rdzv_conf.startswith(f"is_host={int(number == 0)},")
        assert asked.module and asked.training_script == "scaler.train"
        assert asked.training_script_args == ["dinov2/demo", *WORDS]


def test_torchrun_goes_on_with_fewer_machines_where_they_are_enough() -> None:
    launch = plan("torchrun", job(nodes=2, processes=4, hosts=HOSTS, min_nodes=1))
    assert launch.min_hosts == 1
    assert all(words[words.index("--nnodes") + 1] == "1:2" for words in launch.hosts.values())


@pytest.mark.parametrize("strategy", ["auto", "fsdp2", "zero3"])
def test_accelerate_on_every_host(strategy: str) -> None:
    launch = over_hosts("accelerate", strategy=strategy)
    for number, (name, words) in enumerate(launch.hosts.items()):
        assert f"PET_LOCAL_ADDR={name}" in words
        asked, _ = launcher_environment(after(words, "accelerate.commands.launch"))
        assert Path(asked.config_file).name == f"{'ddp' if strategy == 'auto' else strategy}_nodes.yaml"
        assert (asked.nnodes, asked.nproc_per_node, asked.node_rank) == ("2", "4", number)
        assert (asked.rdzv_backend, asked.rdzv_endpoint, asked.max_restarts) == ("c10d", "a:4321", 5)
        assert asked.training_script_args == ["dinov2/demo", *WORDS]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("nodes", ["", "_nodes"])
def test_what_each_configuration_tells_the_workers(name: str, nodes: str) -> None:
    """The same strategy on one machine and on several."""
    _, told = launcher_environment(["--config_file", str(CONFIGS / f"{name}{nodes}.yaml"), "-m", "x"])
    told = {key: value for key, value in told.items() if "DYNAMO" not in key and "_CONFIG_DS_" not in key}
    assert told.pop("ACCELERATE_MIXED_PRECISION") == "no"
    if name == "ddp":
        assert told == {}
    elif name.startswith("zero"):
        assert told == {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": name[-1]}
    else:
        assert told["ACCELERATE_USE_FSDP"] == "true" and told["FSDP_VERSION"] == "2"
        sizes = {key: told.get(f"PARALLELISM_CONFIG_DP_{key}_SIZE") for key in ("REPLICATE", "SHARD")}
        hybrid = {"REPLICATE": "2", "SHARD": "8" if nodes else "2"}
        assert sizes == (hybrid if name == "fsdp2_hybrid" else {"REPLICATE": None, "SHARD": None})
    values = yaml.safe_load((CONFIGS / f"{name}{nodes}.yaml").read_text())
    assert values["num_machines"] == (2 if nodes else 1)
    if name == "fsdp2_hybrid":
        sizes = values["parallelism_config"]
        product = sizes["parallelism_config_dp_replicate_size"] * sizes["parallelism_config_dp_shard_size"]
        assert values["num_processes"] == product


def launcher_environment(words: list[str]) -> tuple[Any, dict[str, str]]:
    """accelerate's own reading of its command line: torchrun's options, and the variables that workers get."""
    from accelerate.commands import launch as accelerate
    from accelerate.utils import launch as environments

    asked, *_ = accelerate._validate_launch_command(accelerate.launch_command_parser().parse_args(words))
    if asked.use_deepspeed:
        asked.deepspeed_fields_from_accelerate_config = ""
        command, variables = environments.prepare_deepspeed_cmd_env(asked)
        assert command is None, "torchrun starts the workers, not pdsh"
    else:
        variables = environments.prepare_multi_gpu_env(asked)
    ours = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    return asked, {name: value for name, value in variables.items() if name.startswith(ours)}


def test_deepspeed_over_hosts(tmp_path: Path) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    words = (*WORDS, f"run.dir={tmp_path}/run")
    hosts = {"nodes": 2, "processes": 4, "hosts": HOSTS, "port": 4321}
    launch = plan("deepspeed", Job(recipe="dinov2/demo", overrides=words, environment={"A": "b"}, **hosts))
    asked = runner.parse_args(after(launch.command, "deepspeed.launcher.runner"))
    assert (asked.master_addr, asked.master_port, asked.launcher, asked.force_multi) == ("a", 4321, "pdsh", True)
    assert asked.module and asked.user_script == "scaler.train" and asked.user_args == ["dinov2/demo", *words]
    assert launch.files[asked.hostfile] == "a slots=4\nb slots=4\n"
    (file,) = [word.partition("=")[2] for word in launch.command if word.startswith("DS_ENV_FILE=")]
    assert launch.files[file] == "A=b\n"
    made = subprocess.run(["sh", "-e"], input=launch.text.rpartition("\nenv ")[0], text=True, cwd=tmp_path)
    assert made.returncode == 0 and Path(asked.hostfile).read_text() == "a slots=4\nb slots=4\n"


@pytest.mark.parametrize(("name", "stage"), [("zero2_cpu_offload", 2), ("zero3_cpu_offload", 3)])
def test_the_offload_files_say_nothing_that_a_recipe_says(name: str, stage: int) -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    path = CONFIGS.parent / f"deepspeed/{name}.json"
    settings = StrategySettings(name=f"zero{stage}", precision="bf16", deepspeed_config=str(path))
    read = config.DeepSpeedConfig(merged_config(settings, stage=stage, trained_parameters=1)).zero_config
    assert read.stage == stage and read.offload_optimizer.device == "cpu"
    assert (read.offload_param is not None) == (stage == 3)


def test_machines_without_names() -> None:
    launch = plan("torchrun", job(nodes=3, processes=8))
    assert launch.command == [] and launch.hosts == {}
    assert [f"--local-addr HOST_{i} " in launch.text for i in range(4)] == [True, True, True, False]
    with pytest.raises(ValueError, match=r"names of the 3 machines.*--hosts"):
        run(launch, job(nodes=3, processes=8))
    with pytest.raises(ValueError, match="--hosts"):
        plan("deepspeed", job(nodes=3, processes=8))


@pytest.mark.parametrize("kind", ["accelerate", "torchrun", "deepspeed"])
def test_the_text_is_the_command_on_one_machine(kind: str) -> None:
    launch = plan(kind, job(processes=2, environment={"A": "b c"}))
    (line,) = [line for line in launch.text.splitlines() if not line.startswith("#")]
    assert shlex.split(line) == launch.command
    assert launch.command[:2] == ["env", "A=b c"] and launch.command[-3:] == ["dinov2/demo", *WORDS]


def test_every_kind_has_a_module_with_a_plan() -> None:
    assert list(KINDS) == ["accelerate", "deepspeed", "torchrun", "slurm", "kubernetes"]


WAIT = """
import os, pathlib, signal, sys, time
def leave(number, frame):
    time.sleep(0.5)
    pathlib.Path(f"left-{os.environ['RANK']}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(f"ready-{os.environ['RANK']}").touch()
time.sleep(120)
"""


def test_a_signal_reaches_the_processes_of_deepspeed_on_one_machine(tmp_path: Path) -> None:
    """Its launcher knows two signals only; those who stop get the time that they need."""
    pytest.importorskip("deepspeed")
    (tmp_path / "waiting.py").write_text(WAIT)
    code = (
        "import sys; from launch.job import Job; from launch import plan, run; from dataclasses import replace\n"
        "job = Job(recipe='dinov2/demo', processes=2, port=int(sys.argv[1])); launch = plan('deepspeed', job)\n"
        "words = ['waiting' if word == 'scaler.train' else word for word in launch.command]\n"
        "sys.exit(run(replace(launch, command=words), job))"
    )
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parents[1])}
    command = [sys.executable, "-c", code, str(20000 + os.getpid() % 10000)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 1
    assert {path.name for path in tmp_path.glob("left-*")} == {"left-0", "left-1"}
