"""What the site needs of MkDocs beyond its settings.

A page may link to any file of the repository, by its path from the page, as on a code host. Those outside of docs/
become pages, or files, of the site beneath ``repository/``, and so do the ones that these link to. A page may hold the
help of a command, ``<!-- mea plan --help -->``, and the fields of a configuration, ``<!-- fields of
models.config.TransformerConfig -->``. And what is built must not load anything from another host.
"""

import dataclasses
import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, InclusionLevel

log = get_plugin_logger("hooks")
ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()([^()\s:#]+)(#[^()\s]*)?(?=\))")
HELP = re.compile(r"<!-- (mea [a-z]+ --help) -->")
FIELDS = re.compile(r"<!-- fields of ([\w.]+)\.(\w+) -->")


def on_files(files, config):
    """Add the files outside of docs/ that pages link to."""
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        file = waiting.pop()
        for link, _ in LINK.findall(Path(file.abs_src_path).read_text()):
            place = repository_path(file, link)
            there = ROOT / place
            if place.startswith((".", "docs/")) or not there.is_file() or files.get_file_from_path(site_path(place)):
                continue
            added = File.generated(
                config, site_path(place), abs_src_path=str(there), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(added)
            if added.is_documentation_page():
                waiting.append(added)
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links to files outside of docs/ into links within the site, and put in the help of commands."""

    def within(match):
        target = site_path(repository_path(page.file, match[1]))
        return relpath(target, str(PurePosixPath(page.file.src_uri).parent)) + (match[2] or "")

    markdown = HELP.sub(lambda match: help_of(match[1].split()), LINK.sub(within, markdown))
    return FIELDS.sub(lambda match: fields_of(*match.groups()), markdown)


def on_post_build(config):
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for address in foreign(path.read_text(), path.suffix):
                log.warning(f"{path.relative_to(config.site_dir)} loads {address} from another host")


def repository_path(file, link):
    """The path in the repository of what a file links to."""
    return normpath(Path(file.abs_src_path).relative_to(ROOT).parent.joinpath(link).as_posix())


def site_path(place):
    return place.removeprefix("docs/") if place.startswith("docs/") else f"repository/{place}"


def help_of(command):
    program = [sys.executable, "-m", "memory_efficient_attention_pytorch", *command[1:]]
    return f"```text\n{subprocess.run(program, capture_output=True, text=True, check=True).stdout}```"


def fields_of(module, name):
    config = getattr(importlib.import_module(f"memory_efficient_attention_pytorch.{module}"), name)
    rows = ["| field | default | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(config):
        about = field.metadata
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        unset = f"; None: {about['unset']}" if about.get("unset") else ""
        rows.append(f"| `{field.name}` | {default} | {about['help']}{unset} |")
    return "\n".join(rows)


def foreign(text, suffix):
    """The addresses on other hosts that a page or a style sheet loads by itself; links to follow are none."""
    if suffix == ".css":
        return re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')\s]+)", text)
    found = _Loaded()
    found.feed(text)
    return found.addresses


class _Loaded(HTMLParser):
    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            loads = name in ("src", "srcset", "data", "poster") or (tag == "link" and name == "href")
            if loads and value and re.match(r"(https?:)?//", value):
                self.addresses.append(value)
            if name == "class" and value and {"mermaid", "arithmatex"} & set(value.split()):
                self.addresses.append(f"the script for {value}")
