"""Runs a check in a process of its own, for as long as it may take, and listens to what it finds.

    findings = run_check("installation", {"quick": True})

What the process prints goes nowhere; each finding is a line on a pipe. One that crashes, is killed or hangs is an error
finding of its own, after those that it had made.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any

from scaler.doctor.finding import Finding

# Check → the module whose `check(asked)` makes the findings.
CHECKS = {
    "versions": "scaler.doctor.versions",
    "installation": "scaler.doctor.installation",
    "deepspeed": "scaler.doctor.deepspeed_ops",
    "recipe": "scaler.doctor.recipe",
    "data": "scaler.doctor.data",
    "ranks": "scaler.doctor.ranks",
}


def run_check(name: str, asked: Mapping[str, Any], *, seconds: float = 60) -> list[Finding]:
    """What the check finds.

    Args:
        name: one of CHECKS.
        asked: what it is to look at; JSON.
        seconds: after which it is ended.
    """
    command = [sys.executable, "-m", "scaler.doctor.checks", CHECKS[name], json.dumps(asked)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
            failure = None if process.returncode == 0 else _failure(process.returncode, errors.decode(errors="replace"))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, errors = process.communicate()
            lines = errors.decode(errors="replace").strip().splitlines()
            failure = f"was not done after {seconds:.0f} s" + (f"; its last words: {lines[-1]}" if lines else "")
    findings = [Finding(**json.loads(line)) for line in out.decode().splitlines() if line.endswith("}")]
    if failure is not None:
        fix = f"{' '.join(command[:4])} '{command[4]}' shows where"
        findings.append(Finding("error", name, f"this check {failure}", fix))
    return findings


def _failure(code: int, errors: str) -> str:
    """How a process ended, in its own last words."""
    lines = errors.strip().splitlines() or ["without a word"]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed"
    return f"{how}: {lines[-1]}"


def main() -> None:
    """`python -m scaler.doctor.checks MODULE ASKED`: findings on standard output, all else on standard error."""
    module, asked = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for finding in import_module(module).check(json.loads(asked)):
            print(json.dumps(asdict(finding)), file=out, flush=True)


if __name__ == "__main__":
    main()
