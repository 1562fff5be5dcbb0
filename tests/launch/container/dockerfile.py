"""Dockerfiles as far as ours goes: what its lines say, and carrying them out in a folder instead of an engine."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.launch.container.root import Root

BASE_VARIABLES = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its word in capitals, and what follows it, with continued lines as they are."""

    word: str
    value: str

    @property
    def words(self) -> list[str]:
        """The value as a JSON list, or as words."""
        return list(json.loads(self.value)) if self.value.startswith("[") else shlex.split(self.value)


@dataclass
class Stage:
    """What follows one FROM."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def the(self, word: str) -> Instruction:
        """Its only instruction with this word."""
        (found,) = (instruction for instruction in self.instructions if instruction.word == word)
        return found


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM with their defaults, and the stages."""
    lines = [line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "\\\\\0", "".join(lines))  # a marked end does not end the instruction
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, value = line.replace("\\\0", "\\\n").strip().partition(" ")
        if word == "FROM":
            base, _, name = value.partition(" AS ")
            stages.append(Stage(name, substitute(base, arguments)))
        elif not stages:
            name, _, default = value.partition("=")
            arguments[name] = default
        else:
            stages[-1].instructions.append(Instruction(word, value.strip()))
    return arguments, stages


def substitute(text: str, variables: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` as Docker replaces them outside of RUN."""
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda found: variables.get(found[1] or found[2], ""), text)


def variables_of(stage: Stage) -> dict[str, str]:
    """What ENV gives every process of the image."""
    found = dict(BASE_VARIABLES)
    for instruction in stage.instructions:
        if instruction.word == "ENV":
            found |= settings(instruction, found)
    return found


def settings(instruction: Instruction, variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that one ENV sets, after those that are known."""
    pairs = (word.split("=", 1) for word in instruction.words if word.strip())
    return {name: substitute(value, variables) for name, value in pairs}


def carry_out(
    stage: Stage,
    root: Root,
    *,
    context: Path,
    arguments: Mapping[str, str],
    stages: Mapping[str, Root],
    environment: Mapping[str, str],
    wanted: Callable[[str], bool] = lambda script: True,
) -> str:
    """Do in `root` what a stage's RUN, COPY, ENV, ARG, WORKDIR and SHELL say; the user that USER leaves.

    Args:
        stage: the stage.
        root: the root of its base image, which is changed.
        context: the folder that COPY copies from.
        arguments: `--build-arg`s.
        stages: the roots of earlier stages by name, for `COPY --from`.
        environment: variables of the machine that RUN sees besides those of the image.
        wanted: which RUN scripts to run; the others are passed over.

    Raises:
        AssertionError: a command failed.
    """
    shell, folder, user = ["/bin/sh", "-c"], "/", "root"
    variables = dict(BASE_VARIABLES)  # and what ENV adds
    known: dict[str, str] = {}  # ARG
    for instruction in stage.instructions:
        word, value = instruction.word, instruction.value
        if word == "ARG":
            name, _, default = value.partition("=")
            known[name] = arguments.get(name, default)
        elif word == "ENV":
            variables |= settings(instruction, variables)
        elif word == "SHELL":
            shell = instruction.words
        elif word == "WORKDIR":
            folder = value
            root.path(folder).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            user = substitute(value, {**variables, **known})
        elif word == "COPY":
            words = instruction.words
            options = dict(item[2:].split("=", 1) for item in words if item.startswith("--"))
            *sources, target = (item for item in words if not item.startswith("--"))
            place = root.path(target if target.startswith("/") else f"{folder}/{target}")
            for source in sources:
                found = stages[options["from"]].path(source) if "from" in options else context / source
                copied = place / found.name if target.endswith("/") else place
                _copy(found, copied)
                if "chmod" in options:
                    copied.chmod(int(options["chmod"], 8))
        elif word == "RUN" and wanted(value):
            result = root.run([*shell, value], environment={**environment, **variables, **known}, folder=folder)
            assert result.returncode == 0, f"{value}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return user


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def context_of(folder: Path, patterns: str, target: Path) -> None:
    """Copy what a .dockerignore (its lines) leaves of `folder` into `target`."""
    rules = [line for line in patterns.splitlines() if line and not line.startswith("#")]
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not ignored(name, rules):
            _copy(path, target / name)


def ignored(name: str, rules: list[str]) -> bool:
    """Whether .dockerignore's `rules` keep a file out: the last one that fits it, or a folder above it, decides."""
    parents = ["/".join(name.split("/")[: i + 1]) for i in range(name.count("/") + 1)]
    verdict = False
    for rule in rules:
        pattern = _regular(rule.removeprefix("!"))
        if any(re.fullmatch(pattern, parent) for parent in parents):
            verdict = not rule.startswith("!")
    return verdict


def _regular(pattern: str) -> str:
    """A pattern of .dockerignore as a regular expression: `*` stays within a folder, `**/` is any folders."""
    parts = [
        "(?:.*/)?"
        if part == "**/"
        else fnmatch.translate(part).removeprefix("(?s:").removesuffix(")\\Z").replace(".*", "[^/]*")
        for part in re.split(r"(\*\*/)", pattern)
        if part
    ]
    return "".join(parts)
