"""One HTML page that needs nothing beside itself: styles and pictures are inside."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE = """
:root { --ink: #1c1c1c; --soft: #5c5c5c; --page: #ffffff; --card: #f5f5f3; --line: #d9d9d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --soft: #a8a8a4; --page: #161616; --card: #222222; --line: #3c3c3a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 1.2rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.4rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.4rem; }
p { margin: 0.4rem 0 0.8rem; color: var(--soft); }
ul { background: var(--card); border-radius: 8px; padding: 0.8rem 1rem 0.8rem 2rem; }
.picture { overflow-x: auto; }
img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 8px;
  border: 1px solid var(--line); padding: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums;
  margin: 0.5rem 0; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts td:first-child { white-space: nowrap; overflow-wrap: normal; color: var(--soft);
  vertical-align: top; }
@media (max-width: 40rem) { .picture img { width: 36rem; max-width: none; } }
summary { cursor: pointer; color: var(--soft); margin-top: 0.5rem; }
"""


class Pictures:
    """Saves figures as figures/NAME.png and NAME.svg of the report."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def save(self, name: str, figure: Figure) -> Path:
        """Write both; the path of the PNG, which the page holds."""
        path = self.folder / f"{name}.png"
        figure.savefig(path)
        # It is laid out now, which takes most of the time.
        figure.set_layout_engine("none")
        # Text stays text, and the same records give the same file.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        return path


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; `facts` is a table of names and values, without a header."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    facts: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, a picture and the numbers behind it."""

    title: str
    text: str
    picture: Path | None = None
    table: Table | None = None


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    kind = ' class="facts"' if table.facts else ""
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table{kind}>{head}<tbody>\n{body}</tbody></table></div>\n'


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>\n"]
    if section.picture is not None:
        data = base64.b64encode(section.picture.read_bytes()).decode()
        alt = escape(f"{section.title}. {section.text}", quote=True)
        image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
        parts.append(f'<div class="picture">{image}</div>\n')
    if section.table is not None:
        table = _table(section.table)
        # A picture says it first; the numbers are one click away.
        if section.picture is not None:
            table = f"<details><summary>The numbers</summary>\n{table}</details>\n"
        parts.append(table)
    return f"<section>\n{''.join(parts)}</section>\n"


def render(title: str, summary: list[str], sections: list[Section]) -> str:
    """The page: title, the summary's lines, the sections."""
    lines = "".join(f"<li>{escape(line)}</li>\n" for line in summary)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<ul>\n{lines}</ul>\n"
        f"{''.join(map(_section, sections))}</body>\n</html>\n"
    )
