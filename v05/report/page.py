"""Writes the page: HTML, style and script, with the document and plotly.js inside, in one file that needs no network.

plotly.js and the document are compressed, which shrinks the page from 5 MB to 2, and encoded as base64, so that no text of a policy
can end a script or become markup. The page unpacks them (with `DecompressionStream`, which browsers have since 2023) and inserts
texts as text only. Its content security policy allows only its two scripts, by their hashes, and no network requests. Inline styles
are allowed because plotly.js needs them.
"""

from __future__ import annotations

import base64
import colorsys
import gzip
import hashlib
import html
import re
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import plotly.offline

from v05.files import explained, replacing
from v05.methods import METHODS
from v05.report.figures import Document
from v05.train.metrics import plain_json

POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)
LIGHTNESS = 0.26  # difference in lightness between a method's darkest and lightest variant


def write_page(document: Document, title: str, file: Path) -> None:
    """Write the page of `document`, completely or not at all. The folder is made if necessary."""
    here = files("v05.report")
    plotly_script, script = plotly.offline.get_plotlyjs(), (here / "page.js").read_text("utf-8")
    parts = {
        "title": html.escape(title),
        "policy": POLICY.format(scripts=f"{source_hash(script)} {source_hash(plotly_script)}"),
        "style": (here / "page.css").read_text("utf-8"),
        "plotly": packed(plotly_script),
        "document": packed(plain_json(coloured({**document, "title": title}))),
        "script": script,
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], (here / "page.html").read_text("utf-8"))
    with explained(file, "nothing else is lost"), replacing(file) as scratch:
        scratch.write_text(page, encoding="utf-8")


def source_hash(script: str) -> str:
    """The hash of an inline script, as a content security policy writes it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def coloured(document: Document) -> Document:
    """The document with colours added to each group. Groups of the same name have the same colours."""
    variants: dict[str, list[str]] = defaultdict(list)
    for group in document["groups"]:
        if group["name"] not in variants[group["method"]]:
            variants[group["method"]].append(group["name"])
    for group in document["groups"]:
        names = variants[group["method"]]
        place = names.index(group["name"])
        shift = LIGHTNESS * (place / (len(names) - 1) - 0.5) if len(names) > 1 else 0.0
        group["colours"] = [shifted(colour, shift) for colour in METHODS[group["method"]].colour]
        group["variant"] = place
    return document


def shifted(colour: str, by: float) -> str:
    """A colour #rrggbb with `by` added to its lightness."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    channels = colorsys.hls_to_rgb(hue, min(0.85, max(0.15, lightness + by)), saturation)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
