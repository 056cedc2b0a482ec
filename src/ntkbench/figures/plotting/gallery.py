"""All figures with their captions on one page of HTML that needs no other file; failed ones are marked.

The picture of all claims has their table below it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ntkbench.errors import BadInput
from ntkbench.figures.plotting import claims, labels

TEMPLATE = Path(__file__).with_name("gallery.html")
GROUPS = {
    "claims": "What of the papers reproduces",
    "hazelden": "Hazelden: trace estimation",
    "mohamadi": "Mohamadi, Bae, Sutherland: the pNTK",
    "novak": "Novak, Sohl-Dickstein, Schoenholz: fast finite-width kernels",
    "along": "Along training",
}
"""First words of figures' names, in the order of the page; the others come first."""
OWN = "The comparison"
CLAIMS = "claims"
"""Name of the files of all claims of a set of figures."""


def group(name: str) -> str:
    """The group that a figure is shown in, by its name."""
    return GROUPS.get(name.split("_")[0], OWN)


def page(pictures: Sequence[Path], title: str) -> str:
    """The page.

    Args:
        pictures: PNG files, each with its caption beside it as ``.txt``; that of all claims is ``claims.png``, with
            ``claims.csv``.
        title: heading of the page.

    Raises:
        BadInput: a picture has no caption.
    """
    groups: dict[str, list[dict[str, Any]]] = {OWN: [], **{group: [] for group in GROUPS.values()}}
    for picture in sorted(pictures, key=lambda path: path.stem):
        caption = picture.with_suffix(".txt")
        if not caption.exists():
            raise BadInput(f"{picture} has no caption: {caption.name} is not beside it")
        first, _, settings = caption.read_text(encoding="utf-8").partition("\n")
        name, _, text = first.partition(". ")
        with Image.open(picture) as image:
            width, height = image.size  # so that links arrive where they should while pictures load
        groups[group(picture.stem)].append(
            {
                "id": picture.stem,
                "name": name or labels.name_label(picture.stem),
                "text": text,
                "settings": settings,
                "failed": text.startswith(labels.NOT_DRAWN),
                "width": width,
                "height": height,
                "claims": claims.readable(pd.read_csv(picture.with_suffix(".csv"))) if picture.stem == CLAIMS else [],
                "data": base64.b64encode(picture.read_bytes()).decode(),
            }
        )
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    shown = {name: figures for name, figures in groups.items() if figures}
    return environment.get_template(TEMPLATE.name).render(title=title, groups=shown)
