"""What --help shows: stages, recipes, and every key with its value and what it means.

All of it is read from where it is written: docstrings of the stages and of the schema's sections,
comments of conf/. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from pipeline.command_line import CONF, discard_stdout
from pipeline.refusals import flat
from pipeline.schema import CHAIN, STAGES, Config

STAGE_FILES = Path(__file__).resolve().parent / "stages"
# Columns of the keys' values, and where what they mean begins.
VALUE, MEANING = 44, 48
# Characters of a list; of a longer one --cfg job shows the values.
LONGEST = 60
USAGE = "python pipeline/run.py [experiment=NAME] [stage=NAME] [GROUP=NAME] [KEY=VALUE ...]"
MORE = """\
more:
  experiment=NAME --help      the keys as that recipe sets them
  --cfg job                   the same as YAML, long lists too; nothing runs
  -m train.lr=1e-4,3e-4       a job for each value, in variants of their own
  --hydra-help                Hydra's own flags"""


def show_help(composed: DictConfig) -> None:
    """Print the help; what reads it may close the pipe early."""
    try:
        print(help_text(OmegaConf.to_container(composed)), flush=True)
    except BrokenPipeError:
        discard_stdout()


def help_text(values: dict[str, Any], width: int | None = None) -> str:
    """The help, with a composed configuration's values; `width`: columns, or the terminal's."""
    width = width or max(80, min(shutil.get_terminal_size((100, 24)).columns, 120))
    lines = [f"usage: {USAGE}", ""]
    lines.append(f"stages (stage=NAME; chain, the default: {', '.join(CHAIN)}):")
    lines += _entries({stage: stage_line(stage) for stage in STAGES}, width)
    lines += ["", "recipes (experiment=NAME):"]
    recipes = {path.stem: _file_line(path) for path in sorted((CONF / "experiment").glob("*.yaml"))}
    lines += _entries(recipes, width)
    lines += ["", "groups (GROUP=NAME, a file of conf/GROUP):"]
    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "experiment")
    names = {group.name: sorted(path.stem for path in group.glob("*.yaml")) for group in groups}
    lines += _entries({group: ", ".join(files) for group, files in names.items()}, width)
    recipe = values["name"]
    lines += ["", f"keys, as experiment={recipe} sets them:", *_keys(values, width), "", MORE]
    return "\n".join(lines)


def stage_line(stage: str) -> str:
    """The first sentence of the stage's docstring, read without importing it."""
    source = (STAGE_FILES / f"{stage}.py").read_text()
    text = ast.get_docstring(ast.parse(source)).split("\n\n")[0]
    text = re.sub(rf"^(stage=|Stage )?{stage}: ", "", " ".join(text.split()))
    return text[0].upper() + text[1:]


def _file_line(path: Path) -> str:
    """The comment that a file of conf/ begins with."""
    lines = path.read_text().splitlines()
    lines = [line for line in lines[: _first_key(lines)] if not line.startswith("# @package")]
    return " ".join(line.removeprefix("#").strip() for line in lines)


def _first_key(lines: list[str]) -> int:
    return next(i for i, line in enumerate(lines) if line and not line.startswith("#"))


def _keys(values: dict[str, Any], width: int) -> Iterator[str]:
    meanings = section_meanings(Config) | file_meanings(CONF / "config.yaml")
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    yield from _lines_of(
        {name: value for name, value in values.items() if name not in sections}, meanings, width
    )
    for name, section in sections.items():
        yield ""
        yield from textwrap.wrap(f"{name}: {meanings.get(name, '')}".rstrip(": "), width)
        yield from _lines_of(flat(section, f"{name}."), meanings, width)


def _lines_of(values: dict[str, Any], meanings: dict[str, str], width: int) -> Iterator[str]:
    for key, value in values.items():
        long = isinstance(value, list | dict) and len(_shown(value)) > LONGEST
        shown = f"  {key}={'...' if long else _shown(value)}"
        meaning = textwrap.wrap(meanings.get(key, ""), width - MEANING)
        if len(shown) > VALUE or not meaning:
            yield shown
        else:
            yield f"{shown:<{MEANING}}{meaning.pop(0)}"
        yield from (" " * MEANING + line for line in meaning)


def _shown(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    return str(value)


def _entries(texts: dict[str, str], width: int) -> Iterator[str]:
    column = 4 + max(map(len, texts))
    for name, text in texts.items():
        lines = textwrap.wrap(text, width - column) or [""]
        yield f"  {name}".ljust(column) + lines[0]
        yield from (" " * column + line for line in lines[1:])


def section_meanings(section: type, prefix: str = "") -> dict[str, str]:
    """What keys mean by the docstrings of a dataclass and of those that it holds.

    There "key: text. key2, key3: text" follows on what the section is.
    """
    fields = [field.name for field in dataclasses.fields(section)]
    names = "|".join(fields)
    doc = " ".join(inspect.getdoc(section).split())
    parts = re.split(rf"(?:^|(?<=[.;] ))((?:{names})(?:, (?:{names}))*): ", doc)
    found = {prefix.rstrip("."): parts[0].strip()} if prefix else {}
    for keys, text in zip(parts[1::2], parts[2::2], strict=True):
        found |= {f"{prefix}{key}": text.strip().rstrip(".;") for key in keys.split(", ")}
    for name, kind in get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            found |= section_meanings(kind, f"{prefix}{name}.")
    return found


def file_meanings(path: Path) -> dict[str, str]:
    """What keys mean by the comments above them in a YAML file of nested mappings."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    comment: list[str] = []
    lines = path.read_text().splitlines()
    for line in lines[_first_key(lines) :]:
        if text := re.match(r"\s*#\s?(.*)", line):
            comment.append(text[1])
        elif key := re.match(r"(\s*)(\w+):", line):
            indent = len(key[1])
            parents = [parent for parent in parents if parent[0] < indent] + [(indent, key[2])]
            if comment:
                found[".".join(name for _, name in parents)] = " ".join(comment)
            comment = []
        else:
            comment = []
    return found
