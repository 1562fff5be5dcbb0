"""Hostfiles, and which of their hosts and slots a job uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch import make_job
from launch.hosts import choose_hosts, read_hosts
from launch.job import Host
from scaler.recipe import StrategySettings

EXAMPLE = Path(__file__).parents[2] / "configs/deepspeed/hostfile"


def test_the_example_is_read_as_deepspeed_reads_it() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    hosts = read_hosts(EXAMPLE)
    assert hosts == (Host("node-1", 8), Host("node-2", 8))
    assert {host.name: host.slots for host in hosts} == runner.fetch_hostfile(str(EXAMPLE))


def test_comments_and_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("\n# all\n  10.0.0.1   slots=2  # the first\nb.example.org slots=4\n")
    assert read_hosts(tmp_path / "hosts") == (Host("10.0.0.1", 2), Host("b.example.org", 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=1\nb\n", r"line 2: 'b' is not `NAME slots=N`"),
        ("a slots=0\n", r"line 1: 'a slots=0' is not"),
        ("a slots=1 b slots=2\n", "line 1"),
        ("user@a slots=1\n", "line 1"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
        ("a slots=1\n\na slots=2\n", "line 3: a is there already"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_hosts(tmp_path / "hosts")
    assert str(tmp_path / "hosts") in str(error.value)


def test_which_hosts_and_slots() -> None:
    hosts = (Host("a", 4), Host("b", 4), Host("c", 2))
    assert choose_hosts(hosts, nodes=2) == (Host("a", 4), Host("b", 4))
    assert choose_hosts(hosts, processes=2) == (Host("a", 2), Host("b", 2), Host("c", 2))
    with pytest.raises(ValueError, match=r"c has 2 slots and a 4.*--processes 2"):
        choose_hosts(hosts)
    with pytest.raises(ValueError, match="3 processes, but c has 2 slots"):
        choose_hosts(hosts, processes=3)
    with pytest.raises(ValueError, match="4 nodes, but the hostfile names 3"):
        choose_hosts(hosts, nodes=4)


def job(*, min_ranks: int | None = None, **options: Any) -> Any:
    return make_job("simclr/demo", ["a.b=c"], settings=StrategySettings(name="fsdp2", min_ranks=min_ranks), **options)


def test_a_job_of_a_hostfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    made = job(hostfile=EXAMPLE, environment=["NCCL_DEBUG=INFO", "X=a=b"], port=4444, max_restarts=None)
    assert (made.nodes, made.processes, made.strategy, made.port) == (2, 8, "fsdp2", 4444)
    assert made.max_restarts == 3, "the default of Job"
    carried = {name: value for name, value in made.environment.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    assert carried == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_DEBUG": "INFO", "X": "a=b"}
    assert job(processes=2).environment == {}, "processes of this machine get this shell's variables anyway"


def test_how_many_machines_are_enough() -> None:
    assert job(nodes=4, processes=8).min_nodes is None
    assert job(nodes=4, processes=8, min_ranks=9).min_nodes == 2
    assert job(nodes=4, processes=8, min_ranks=32).min_nodes is None


@pytest.mark.parametrize("word", ["X", "=1", "A B=1"])
def test_a_variable_without_a_value(word: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=VALUE"):
        job(environment=[word])
