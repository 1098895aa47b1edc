"""Files outside docs/ that its pages link to: the site gets a copy of each, so that no link leaves it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
FOLDER = "project"
"""Where the copies lie in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add every file that a page links to outside docs/."""
    root = Path(config.config_file_path).parent
    for page in files.documentation_pages():
        for target in LINK.findall(page.content_string):
            name = f"{FOLDER}/{target}"
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(root / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let those links lead to the copies."""
    return LINK.sub(rf"{FOLDER}/\1", markdown)
