"""What happens to a command line before there is a configuration: prompts, sweeps and errors."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException

from pipeline.manifest import STOPPED_BY_FILE
from pipeline.refusals import nearest, no_such_key

CONF = Path(__file__).resolve().parent.parent / "conf"
PROMPT = "generate.prompt"
# What a job of a sweep ends with when it was asked to stop: the sweep then stops too.
STOPPED = (STOPPED_BY_FILE, 128 + signal.SIGTERM, 128 + signal.SIGINT)
# Swept values of these share a variant: the name of a run already holds them, or the stages before
# the swept one do not depend on them.
IN_ONE_VARIANT = ("experiment", "name", "stage", "suite", "outputs", "data.shard", "eval.shard")
SECTIONS_IN_ONE_VARIANT = ("generate", "inspect", "plan", "report", "benchmark", "cluster")
# Of a folder's name, which may have 255 bytes.
LONGEST_VARIANT = 120


def quoted(text: str) -> str:
    """The text as a quoted value of Hydra's grammar, in which nothing is an interpolation."""
    text = re.sub(r"(\\*)\$\{", lambda found: rf"{found[1] * 2}\${{", text)
    return QuotedString(text, Quote.double).with_quotes()


def with_plain_prompt(arguments: Sequence[str]) -> list[str]:
    """The arguments, where generate.prompt=TEXT is any text, without Hydra's quotes around it."""
    made = list(arguments)
    for index, argument in enumerate(arguments):
        key, equals, text = argument.partition("=")
        if key == PROMPT and equals and not _is_quoted(argument):
            made[index] = f"{PROMPT}={quoted(text)}"
    return made


def _is_quoted(argument: str) -> bool:
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return isinstance(override._value, QuotedString)


def sweep_variant(arguments: Sequence[str], job: Sequence[str]) -> str | None:
    """The variant of one job of a sweep, such as lr_1e-4; None where it needs none of its own.

    Args:
        arguments: overrides as typed, of which some have several values.
        job: those of the job, with one value each.
    """
    typed = OverridesParser.create().parse_overrides(list(arguments))
    if any(override.key_or_group == "variant" for override in typed):
        return None
    swept = [override for override in typed if _names_a_variant(override)]
    last_parts = Counter(_last_part(override.key_or_group) for override in swept)
    parts = []
    for override in swept:
        key, element = override.key_or_group, f"{override.get_key_element()}="
        last = _last_part(key)
        value = next(text.removeprefix(element) for text in job if text.startswith(element))
        value = re.sub(r"^[^\w.-]+|[^\w.-]+$", "", value, flags=re.ASCII)
        value = re.sub(r"[^\w.-]+", "-", value, flags=re.ASCII)
        parts.append(f"{last if last_parts[last] == 1 else key}_{value}")
    return "_".join(parts)[:LONGEST_VARIANT] or None


def _last_part(key: str) -> str:
    return key.rpartition(".")[2]


def _names_a_variant(override: Override) -> bool:
    key = override.key_or_group
    return override.is_sweep_override() and not (
        key in IN_ONE_VARIANT or key.partition(".")[0] in SECTIONS_IN_ONE_VARIANT
    )


def run_job(arguments: Sequence[str]) -> int:
    """Run one job of a sweep, `python *arguments`, in a process of its own; its exit code.

    A process that has trained holds memory, process groups and random states of that run.
    Ctrl-C reaches the job by itself, SIGTERM is passed on, and the job has its time to save.
    """
    process = subprocess.Popen([sys.executable, *arguments])
    handlers = {
        signal.SIGINT: lambda number, frame: None,
        signal.SIGTERM: lambda number, frame: process.terminate(),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def discard_stdout() -> None:
    """After a BrokenPipeError: let Python flush what is left of standard output into nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """What is wrong with a command line that Hydra cannot compose, and how to fix it."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error.override)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: {nearest(name, error.options)}{_must_be(group, error.options)}"
    if found := re.match(r"Ambiguous value for argument '(.*)'\n1\. ", text, re.DOTALL):
        key, _, value = found[1].partition("=")
        return (
            f"{found[1]}: several values; add -m to run each of them, write {key}=[{value}] for a "
            f"list, or quote one text: {shlex.quote(f'{key}={quoted(value)}')}"
        )
    if found := re.match(r"Could not override '(.+?)'", text):
        return no_such_key(found[1], _groups())
    if found := re.match(r"Multiple values for (\S+)\. ", text):
        return f"+{found[1]}: has a value already, which {found[1]}=NAME replaces; drop the +"
    if text.startswith("Config group override must be a string"):
        for group, _, name in (argument.partition("=") for argument in arguments):
            options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            if group in _groups() and name not in options:
                return f"{group}={name}: {_must_be(group, options)}, or drop {group}={name}"
    text = text.partition("\nConfig search path:")[0] or type(error).__name__
    return f"{' '.join(text.split()).rstrip('.')}; --help lists the keys"


def _explain_grammar(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals:
        return f"{argument}: must be KEY=VALUE; --help lists the keys"
    if value.lstrip().startswith(("[", "{")):
        return (
            f"{argument}: the value cannot be read; every [ {{ ( and quote must be closed, and "
            "inside a list a text with any of ~ , ' \" ( ) [ ] { } = is written with quotes of its "
            "own: \"data.sources=[{name: mine, path: '~/texts', format: text}]\""
        )
    return (
        f"{argument}: the value cannot be read; every [ {{ ( and quote must be closed, and a text "
        f"with any of , ' \" ( ) [ ] {{ }} = \\ is written with quotes inside the shell's: "
        f"{shlex.quote(f'{key}={quoted(value)}')}"
    )


def _must_be(group: str, options: Sequence[str]) -> str:
    return f"must be one of {', '.join(sorted(options))}; set {group}"


def _groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())
