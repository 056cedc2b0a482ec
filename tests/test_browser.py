"""A report in a real browser: narrow, dark, printed, sorted and filtered; skipped without Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest

from ntkbench import figures, paths
from ntkbench.figures.plotting import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TABLE = paths.REFERENCE / "default" / "table.csv"
PROBE = """<script>
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#table tbody tr")];
  const heads = [...document.querySelectorAll("#table th")];
  const column = heads.findIndex((head) => head.textContent === "seconds");
  const keys = () => rows().map((row) => row.cells[column].dataset.key);
  const filter = document.getElementById("filter");
  const found = {width: innerWidth, scrolled: document.documentElement.scrollWidth};
  filter.value = "GRU trace";
  filter.dispatchEvent(new Event("input"));
  found.said = document.getElementById("count").textContent;
  found.shown = rows().filter((row) => !row.hidden).map((row) => row.textContent);
  heads[column].firstChild.click();
  found.rising = [heads[column].getAttribute("aria-sort"), keys()];
  heads[column].firstChild.click();
  found.falling = [heads[column].getAttribute("aria-sort"), keys()];
  const style = getComputedStyle(document.body);
  found.colours = [style.color, style.backgroundColor];
  found.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  found.broken = [...document.images].filter((picture) => !picture.naturalWidth).map((picture) => picture.alt);
  parent.postMessage(found, "*");
});
</script></body>"""
FRAME = """<!doctype html><body><iframe src="page.html" style="width:390px;height:800px;border:0"></iframe><pre></pre>
<script>addEventListener("message", (said) => {
  document.querySelector("pre").textContent = JSON.stringify(said.data);
});</script></body>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")]


def browse(folder, *options):
    """The browser's output, with a profile of its own."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=30000", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", timeout=300).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of the committed grid, with some figures, as the current code writes it."""
    folder = tmp_path_factory.mktemp("report")
    table = pd.read_csv(TABLE, low_memory=False)
    made = [figures.draw(name, table, folder)[2] for name in ("exact_cost", "method_map")]
    return report.page(made, "A run", [TABLE], figures=None)


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request, page, tmp_path_factory):
    """The browser's colour scheme, and what the page reports in a frame of 390 pixels."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "page.html").write_text(page.replace(' loading="lazy"', "").replace("</body>", PROBE), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME, encoding="utf-8")
    scheme = ["--force-dark-mode"] if request.param == "dark" else []
    shown = browse(folder, *scheme, "--dump-dom", (folder / "frame.html").as_uri())
    text = re.search("<pre>(.*?)</pre>", shown, re.DOTALL)[1]
    return request.param, json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_a_narrow_page_does_not_scroll_sideways_and_shows_all_pictures(seen):
    _, found = seen
    assert found["width"] == 390 and found["scrolled"] <= 390
    assert found["broken"] == []


def light(colour):
    """Relative luminance of a colour such as ``rgb(1, 2, 3)``."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_can_be_read_in_light_and_in_dark(seen):
    scheme, found = seen
    text, back = map(light, found["colours"])
    assert found["dark"] == (scheme == "dark") and (text > back) == (scheme == "dark")
    assert (max(text, back) + 0.05) / (min(text, back) + 0.05) >= 4.5


def test_cells_are_filtered_and_sorted(seen):
    _, found = seen
    assert found["shown"] and all("gru" in row.lower() and "trace" in row for row in found["shown"])
    assert found["said"].startswith(f"{len(found['shown'])} of ")
    for (said, keys), wanted, sign in ((found["rising"], "ascending", 1), (found["falling"], "descending", -1)):
        numbers = [sign * float(key) for key in keys if key]
        assert said == wanted and numbers == sorted(numbers) and len(set(numbers)) > 10
        assert not any(keys[len(numbers) :]), "what is missing comes last"


def test_the_page_prints(page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri())
    data = (tmp_path / "page.pdf").read_bytes()
    pictures = page.count("<img ")
    assert data.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", data)) > pictures / 2
    assert len(re.findall(rb"/Subtype\s*/Image\b", data)) >= pictures > 0
