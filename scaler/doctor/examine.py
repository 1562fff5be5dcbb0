"""All checks, in the order in which they can build on each other."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from launch import make_job
from launch.check import look
from launch.probe import cores, gpus
from scaler.doctor.checks import run_check
from scaler.doctor.finding import Finding
from scaler.doctor.needs import Needs, local_folder
from scaler.recipe import StrategySettings

_MEETING_SECONDS = 180  # the first process of a machine comes to the meeting when it has looked at that
_WRITTEN = 32 << 20  # bytes of the file by which a disk's rate is measured


def examine(
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    *,
    shards: str | None = None,
    run_dir: str | None = None,
    hosts: Path | None = None,
    processes: int | None = None,
    port: int | None = None,
    feed: Path | None = None,
    quick: bool = False,
) -> list[Finding]:
    """Everything that `scaler doctor` looks at.

    Under a launcher all of its processes call this: the first on each machine looks at that, then all look at each
    other, and each gets the findings of all.

    Args:
        recipe: a YAML file or short name; what a run of it needs is looked at too.
        overrides: its `key=value` words.
        shards, run_dir: instead of the recipe's.
        hosts: a hostfile, whose machines are looked at over ssh instead of this one.
        processes: on each machine; None: the launcher's, the hostfile's slots, or as many as there are GPUs here.
        port: where they would meet; None: 29500, which this machine alone need not have free.
        feed: what `scaler bench feed --out` wrote of the recipe: what its step wants is compared with the cores here.
        quick: this installation alone, in seconds, without using a GPU.

    Raises:
        ValueError: a hostfile that is none, or a file of another kind where `feed` is wanted.
    """
    fed = None if feed is None else _fed(feed)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", started))  # torchrun's, DeepSpeed's name
    here = int(local) if started > 1 else max(1, gpus())
    job = make_job(
        recipe or "",
        overrides,
        settings=StrategySettings(),
        hostfile=hosts,
        nodes=None if hosts else started // here if started > 1 else 1,
        processes=processes or (None if hosts else here),
        port=port,
    )
    if started > 1 and os.environ.get("LOCAL_RANK", "0") != "0":
        return [] if quick else run_check("ranks", {"findings": []}, seconds=_MEETING_SECONDS)
    words = [*overrides, *([f"data.shards={shards}"] * bool(shards)), *([f"run.dir={run_dir}"] * bool(run_dir))]
    asked: dict[str, dict[str, Any]] = {
        "versions": {},
        "installation": {"quick": quick},
        "deepspeed": {},
        "recipe": {
            "recipe": recipe,
            "overrides": words,
            "processes": job.processes,
            "ranks": job.nodes * job.processes,
        },
    }
    wanted = ["versions", "installation", *["deepspeed"] * (not quick), *["recipe"] * (recipe is not None)]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: run_check(name, asked[name]), wanted)
        findings = [finding for several in found for finding in several]
    if quick:
        return findings
    facts = _facts(findings, shards=shards, run_dir=run_dir)
    needs = Needs(**{field.name: facts[field.name] for field in fields(Needs) if field.name in facts})
    if not job.hosts:  # the shards of this machine are looked at more closely below
        needs = replace(needs, shards=None, unchecked="")
    report = look(job, needs, port=(bool(job.hosts) or port is not None) and started == 1, written=_WRITTEN)
    findings += report.findings if job.hosts else [replace(finding, host="") for finding in report.findings]
    findings += [Finding("ok", "not checked", line) for line in report.unchecked]
    if facts["data"]:
        question = {"shards": facts["data"], "views": facts["views"], "cache_dir": facts["cache_dir"]}
        question["decode"] = facts["decode"]
        around = {"cores": cores(), "processes": job.processes, "fed": fed, "elsewhere": bool(job.hosts)}
        findings += run_check("data", question | around)
    if started > 1:
        mine = [asdict(finding) for finding in findings]
        together = run_check("ranks", {"findings": mine}, seconds=_MEETING_SECONDS)
        findings = together if len(together) > 1 else findings + together  # they did not meet
    return findings


def _fed(path: Path) -> dict[str, Any]:
    """What `scaler bench feed` found.

    Raises:
        ValueError: it did not write this file.
    """
    try:
        advice = json.loads(path.read_text())["advice"]
        return {"wanted": float(advice["wanted"]), "gpu_decoding_pays": bool(advice["gpu_decoding_pays"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what `scaler bench feed RECIPE --out {path}` writes: {error}") from None


def _facts(findings: Sequence[Finding], *, shards: str | None, run_dir: str | None) -> dict[str, Any]:
    """What the recipe's check has found of it; without that what the command line says."""
    for finding in findings:
        if finding.check == "recipe" and finding.facts:
            return finding.facts
    folder = local_folder(run_dir or "runs")
    return {
        "shards": local_folder(shards) if shards else None,
        "folders": [folder] if folder else [],
        "data": shards,
        "views": [],
        "cache_dir": None,
        "decode": "cpu",
    }
