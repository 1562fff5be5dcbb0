"""What a container runs, as whom, and that a signal ends it as it should; what the image holds, if built in full."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.container.image import COMPOSE, Container, Service, dress
from tests.launch.container.root import root_over
from tests.long import only_long
from tests.runs import make_shards

# Says when it is ready, and ends with 75 upon a signal, as a training does.
PATIENT = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", os.getppid(), flush=True)
time.sleep(60)
"""


def test_a_signal_reaches_the_command_itself(box: Container) -> None:
    process = subprocess.Popen(box.command("python", "-c", PATIENT), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready 1\n", "nothing between it and process 1"
    assert Service(process).stop() == 75


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to do"),
        (["notebook", "--IdentityProvider.token="], "no arguments"),
        (["ssh", "-D"], "no arguments"),
    ],
)
def test_wrong_words_are_one_line(box: Container, words: list[str], said: str) -> None:
    result = box.run(*words)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_it_is_nobody_special_and_can_write_where_volumes_are(box: Container) -> None:
    script = (
        "id -un; pwd; command -v python; grep -E 'NoNewPrivs|CapPrm' /proc/self/status\n"
        'for folder in /runs "$HOME" /tmp /etc /etc/scaler /opt/scaler /usr/local/bin /data /var/tmp; do\n'
        "touch $folder/written 2>/dev/null && echo $folder; done"
    )
    user, folder, python, *rest = box.run("bash", "-c", script).stdout.split()
    assert (user, folder, python) == ("scaler", "/runs", "/opt/scaler/bin/python")
    assert rest == ["CapPrm:", "0" * 16, "NoNewPrivs:", "1", "/runs", "/home/scaler", "/tmp"]


def test_an_image_that_would_run_as_root_is_not_built() -> None:
    with root_over([Path("/")]) as root, pytest.raises(AssertionError, match="USER_ID=0 is root"):
        dress(root, user_id="0")


@pytest.fixture
def image(box: Container) -> Container:
    if box.root.path("/opt/scaler").is_symlink():
        pytest.skip("the container over this machine's programs has its Python")
    return box


@only_long
def test_the_image_holds_what_the_lock_says(image: Container) -> None:
    script = (
        "pip check && ls /etc/ssh/ssh_host_* /var/lib/apt/lists/* 2>/dev/null; find /opt /etc/scaler -user scaler\n"
        "find / -xdev -name .git -o -xdev -name '*.lock' -path '/source/*' -o -xdev -path '*/.cache/pip' 2>/dev/null\n"
        "python -P -c 'import shards._kernel, shards._files, jupyterlab, deepspeed, onnx' > /dev/null && echo all\n"
        "python -P -c 'import pytest' 2>&1 | tail -n 1"
    )
    result = image.run("bash", "-c", script)
    assert result.stdout.splitlines() == [
        "No broken requirements found.",
        "all",
        "ModuleNotFoundError: No module named 'pytest'",
    ], result.stderr


@only_long
def test_torch_compiles_with_what_is_there(image: Container) -> None:
    script = "import torch; print(torch.compile(lambda x: x.sin() + 1)(torch.zeros(2)))"
    given = {name: value for name, value in COMPOSE["services"]["train"]["environment"].items() if value is not None}
    result = image.run("python", "-c", script, **given)
    assert result.stdout == "tensor([1., 1.])\n", result.stderr


@only_long
def test_the_healthcheck_is_content(image: Container) -> None:
    result = image.run("scaler", "doctor", "--quick", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["error"] == 0


@only_long
def test_a_training_runs_stops_and_goes_on(image: Container, tmp_path: Path) -> None:
    shutil.copytree(make_shards(tmp_path), image.root.path("/runs/shards"))
    words = ["scaler", "train", "simclr/demo", "data.shards=/runs/shards", "run.dir=/runs/first", "--processes", "2"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(image.command(*words), stdout=file, stderr=file)
    metrics, deadline = image.root.path("/runs/first/metrics.jsonl"), time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    assert Service(process).stop() != 0, log.read_text()  # torchrun hides the 75 of its processes
    assert json.loads(image.root.path("/runs/first/exit.json").read_text())["requeue"] is True
    steps = len(metrics.read_text().splitlines())
    result = image.run(*words, f"run.stop_after={steps + 1} steps")
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [*range(1, steps + 2)]
