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

_KEPT_LINES = 40  # of what a check that failed has said

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
    command = [sys.executable, "-m", "scaler.doctor.checks", CHECKS[name]]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, errors="replace"
    ) as process:
        try:
            out, errors = process.communicate(json.dumps(asked), timeout=seconds)
            failure = _failure(process.returncode, errors) if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, errors = process.communicate()
            failure = f"was not done after {seconds:.0f} s: {_last(errors)}"
    findings = [Finding(**json.loads(line)) for line in out.splitlines() if line.endswith("}")]
    if failure:
        said = {"said": errors.splitlines()[-_KEPT_LINES:]}
        fix = "scaler doctor --json has the last lines of what it said"
        findings.append(Finding("error", name, f"this check {failure}", fix, facts=said))
    return findings


def _failure(code: int, errors: str) -> str:
    """How a process ended."""
    return f"{f'was ended by {signal.Signals(-code).name}' if code < 0 else 'failed'}: {_last(errors)}"


def _last(errors: str) -> str:
    """The last line of what a process said."""
    return (errors.strip().splitlines() or ["without a word"])[-1]


def main() -> None:
    """`python -m scaler.doctor.checks MODULE`: what is asked comes in (there may be secrets in it), findings go out."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print
        for finding in import_module(sys.argv[1]).check(json.load(sys.stdin)):
            print(json.dumps(asdict(finding)), file=out, flush=True)
    os._exit(0)  # threads of gloo and others, which the interpreter's end would trip over, end with it


if __name__ == "__main__":
    main()
