"""Writes docs/configuration.md from the config files: `python docs/configuration.py`.

`--check` writes nothing, and exits with status 1 where the page is not current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "configuration.md"
SCRIPTS = {
    "train": "train_det.py",
    "eval": "eval_det.py",
    "visualize": "visualize_det.py",
    "export": "python -m detection.export",
}
HEADER = """# Configuration

<!-- Written by `python docs/configuration.py` from the files in configs/: edit those. -->

Every key is set on the command line as `key=value`, every group as `group=option`:
`python train_det.py model=retinanet data=coco data.root=DIR trainer.steps=20000`. A key that an
option does not list has the value of the option it builds on. `${...}` is the value of another key.
A value is quoted for the shell as any word, `'source=IMG (1).jpg'`; a text with a comma, or in
brackets, once more for Hydra: `'source="a,b.jpg"'`.
"""


class Key(NamedTuple):
    """A key of a config file: its whole name, its value as written, and what is said of it."""

    name: str
    default: str
    comment: str


def read_keys(path: Path) -> Iterator[Key]:
    """The keys of a file under the names that the command line knows them by."""
    text = path.read_text(encoding="utf-8")
    package = re.search(r"^# @package (\S+)", text, re.MULTILINE)
    parents = path.parent.relative_to(CONFIGS).parts
    prefix = package[1].removeprefix("_global_").strip(".").split(".") if package else parents
    lines = text.splitlines()
    yield from _read_mapping(yaml.compose(text), [part for part in prefix if part], lines)


def _read_mapping(node: yaml.Node | None, prefix: list[str], lines: list[str]) -> Iterator[Key]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        names = [*prefix, key.value]
        if names[0] in ("defaults", "hydra") or key.value == "defaults":
            continue
        if isinstance(value, yaml.MappingNode):
            yield from _read_mapping(value, names, lines)
            continue
        start, end = value.start_mark, value.end_mark
        default = lines[start.line][start.column : end.column if end.line == start.line else None]
        yield Key(".".join(names), default, _comment(lines, key.start_mark.line, end))


def _comment(lines: list[str], line: int, end: yaml.Mark) -> str:
    """What stands above a key, as far as it belongs to it, and behind its value."""
    above: list[str] = []
    while line and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        above.insert(0, lines[line].lstrip("# "))
    behind = lines[end.line][end.column :].strip()
    # The comment at the top of a file is about the file.
    return " ".join([*(above if line else []), behind.lstrip("# ")]).strip()


def read_header(path: Path) -> str:
    """The comment at the top of a file, commands in it set apart."""
    header, command = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            content = line.removeprefix("#").removeprefix(" ")
            is_command = content.startswith((" ", "python "))
            (command if is_command else header).append(content.strip())
    words = [word for word in " ".join(command).split() if word != "\\"]
    code = [f"`{' '.join(words)}`"] if words else []
    return " ".join([*header, *code])


def read_bases(path: Path) -> list[str]:
    """What else a file takes in."""
    defaults = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
    bases = []
    for entry in defaults:
        if isinstance(entry, str) and entry != "_self_":
            bases.append(entry)
        elif isinstance(entry, dict):
            bases += [
                f"{group.removeprefix('override ').strip('/')}={option}"
                for group, option in entry.items()
                if option and "hydra/" not in group
            ]
    return [f"`{base}`" for base in bases]


def write_section(path: Path, title: str, *, keys: bool = True) -> str:
    """A file as Markdown: its comment, what it builds on, and its keys."""
    parts = [title]
    if header := read_header(path):
        parts.append(header)
    if bases := read_bases(path):
        parts.append(f"Takes in {', '.join(bases)}.")
    rows = [
        f"| `{key.name}` | `{key.default}` | {key.comment.replace('|', '&#124;')} |"
        for key in read_keys(path)
    ]
    if keys and rows:
        parts.append("\n".join(["| key | value | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def write_page() -> str:
    """The whole page."""
    sections = [HEADER.strip()]
    for name, script in SCRIPTS.items():
        sections.append(write_section(CONFIGS / f"{name}.yaml", f"## `{script}`"))
    groups: dict[str, list[Path]] = {}
    for path in sorted(CONFIGS.rglob("*/*.yaml")):
        group = path.relative_to(CONFIGS).parts[0] if "experiment" in path.parts else None
        groups.setdefault(group or path.parent.relative_to(CONFIGS).as_posix(), []).append(path)
    for group, paths in groups.items():
        sections.append(f"## The group `{group}`")
        for path in paths:
            option = path.relative_to(CONFIGS / group).with_suffix("").as_posix()
            title = f"### `{group}={option}`"
            # An experiment sets keys that are explained elsewhere.
            sections.append(write_section(path, title, keys=group != "experiment"))
    return "\n\n".join(sections) + "\n"


def main() -> None:
    page = write_page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page:
        sys.exit("error: docs/configuration.md is not current: run python docs/configuration.py")


if __name__ == "__main__":
    main()
