"""The documents, as tests read them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def table_rows(part):
    """The cells of the rows of all Markdown tables in a text, without their heads."""
    rows = []
    for line in part.splitlines():
        if re.fullmatch(r"\|[-|]+\|", line):
            rows.pop()  # the head
        elif line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip("| ").split(" | ")])
    return rows
