"""The papers' claims: verdicts, sentences, their table and figure, and the committed claims."""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from ntkbench import figures, paths
from ntkbench.cli import main
from ntkbench.figures.plotting import base, claims, files, labels, report, verdicts
from ntkbench.figures.plotting.claims import ABOVE, BELOW, NOT, PARTLY, REPRODUCED, UNADDRESSED, Claim

NAN = math.nan
PAPERS = [name for name in figures.names() if name.split("_")[0] in ("hazelden", "mohamadi", "novak")]


def claim(**changes) -> Claim:
    given = {"source": "A 2020, figure 1", "name": "a number", "statement": "it is 10", "published": 10.0}
    given |= {"measured": (10.0, 8.0, 12.0), "runs": 5, "of": "seeds"}
    return Claim(**given | changes)


# --- verdicts


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ((10, 9, 11), REPRODUCED),
        ((10, 5, 20), REPRODUCED),  # the ends of the band belong to it
        ((7, 6, 8), REPRODUCED),  # the published value is outside of the interval, and near
        ((10, 4.99, 20), PARTLY),
        ((10, 5, 20.01), PARTLY),
        ((10, 1, 100), PARTLY),  # such an interval is uninformative
        ((3, 2, 5), PARTLY),  # touches the band
        ((3, 2, 4.99), NOT),
        ((30, 20.01, 40), NOT),
        ((10, 10, 10), REPRODUCED),  # exact
        ((10, NAN, 12), PARTLY),  # an unknown end bounds nothing
        ((10, 8, NAN), PARTLY),
        ((30, NAN, 40), PARTLY),
        ((30, 25, NAN), NOT),
        ((3, NAN, 4), NOT),
        ((10, NAN, NAN), UNADDRESSED),  # measured once
        ((NAN, NAN, NAN), UNADDRESSED),
    ],
)
def test_a_number_is_reproduced_if_its_whole_interval_is_near(measured, verdict):
    assert claim(measured=measured).verdict == verdict
    # the same for negative numbers, whose ends are swapped
    assert claim(published=-10.0, measured=tuple(-x for x in (measured[0], *measured[:0:-1]))).verdict == verdict


@pytest.mark.parametrize(
    ("measured", "above", "below"),
    [
        ((12, 11, 13), REPRODUCED, NOT),
        ((8, 7, 9), NOT, REPRODUCED),
        ((12, 9, 13), PARTLY, PARTLY),
        ((12, 10, 13), PARTLY, PARTLY),  # neither more nor less
        ((12, 11, NAN), REPRODUCED, NOT),
        ((8, NAN, 9), NOT, REPRODUCED),
        ((12, NAN, 13), PARTLY, PARTLY),
        ((10, NAN, NAN), UNADDRESSED, UNADDRESSED),
    ],
)
def test_more_or_less_than_a_number_is_judged_by_the_interval_alone(measured, above, below):
    assert claim(measured=measured, relation=ABOVE).verdict == above
    assert claim(measured=measured, relation=BELOW).verdict == below
    for published in (0.0, -10.0):  # whatever the sign of the number
        moved = tuple(x - 10 + published for x in measured)
        assert claim(published=published, measured=moved, relation=ABOVE).verdict == above
        assert claim(published=published, measured=moved, relation=BELOW).verdict == below


def test_exponents_have_a_narrower_band_and_claims_may_be_unaddressed():
    slope = {"published": -0.5, "within": claims.EXPONENT}
    assert claim(**slope, measured=claims.exponent(-0.55, 0.02)).verdict == REPRODUCED
    assert claim(**slope, measured=claims.exponent(-0.9, 0.1)).verdict == NOT
    assert claim(**slope, measured=claims.exponent(-0.5, 0.3)).verdict == PARTLY
    assert claim(**slope, measured=claims.exponent(0.1, 0.05)).verdict == NOT, "another sign"
    assert claim(addressed=False).verdict == UNADDRESSED
    assert claim(published=NAN).verdict == claim(published=0.0).verdict == UNADDRESSED
    assert claim(published=-10.0, measured=(-5.0, -20.0, -4.0)).ratio == (0.5, 0.4, 2.0)


# --- words


def test_a_sentence_has_the_numbers_the_verdict_and_its_reason():
    said = claim(unit="times", best=(0.5, 0.4, 0.6), best_title="an exact one", note="by one method").sentence()
    assert said == (
        "Claim (A 2020, figure 1): it is 10; measured 10 times (8 to 12; 95 % interval, 5 seeds), and 0.5 (0.4 to 0.6) "
        "over an exact one: reproduced (within a factor of 2 of the published value; by one method)."
    )
    assert (
        claim(measured=(40.0, 30.0, NAN))
        .sentence()
        .endswith("measured 40 (30 to ?; 95 % interval, 5 seeds): not reproduced (4 times the published value).")
    )
    assert "partly reproduced (equal to the published value, and an end" in claim(measured=(10, NAN, 12)).sentence()
    three_digits = {"within": claims.DIGITS, "measured": (10.3, 10.2, 10.4)}
    assert claim(**three_digits).reason == "1.03 times the published value"
    assert claim(measured=(10.04, NAN, 12)).reason.startswith("equal to the published value, and an end")
    assert (
        "; nothing was measured: not addressed (too large)."
        in claim(measured=claims.UNKNOWN, note="too large").sentence()
    )
    above = claim(relation=ABOVE, measured=(12.0, 9.0, 13.0)).sentence()
    assert "partly reproduced (the interval contains 10)" in above
    assert "measured once" in claim(measured=(10, NAN, NAN)).reason


def test_medians_and_ranges_of_nothing_are_unknown():
    assert all(map(math.isnan, (*claims.median([NAN]), *claims.ranged([]))))
    assert claims.ranged([3.0, NAN, 1.0, np.inf, 2.0]) == (2.0, 1.0, 3.0)
    value, low, high = claims.median(list(range(1, 100)))
    assert value == 50 and 35 < low < 50 < high < 65
    for few in (claims.median([3.0, 4.0, 5.0, 4.0, 4.0]), claims.ranged([4.0])):
        assert few[0] == 4 and all(map(math.isnan, few[1:])), "no interval, and so no verdict"
    assert claims.count(NAN) == 0 and claims.count(3.0) == 3


PROVENANCE = pd.DataFrame({"git_sha": ["abc", "abc", ""], "machine": ["m", "n", None]})
EXAMPLES = (
    claim(same=True, best=(0.5, 0.4, NAN), best_title="an exact one"),
    claim(relation=ABOVE, unit="times", measured=(12.0, 11.0, NAN), accuracy="<b>", statement="it is <i>more</i>"),
    claim(measured=(1.0, 0.5, 2.0), name="a small one"),
    claim(measured=claims.UNKNOWN, note="too large"),
    claim(published=-0.5, measured=(-0.51, -0.52, -0.5), within=claims.EXPONENT, name="a power"),
)


@pytest.fixture
def table(tmp_path):
    rows = claims.rows("novak_time", EXAMPLES, PROVENANCE)
    (tmp_path / "claims.csv").write_text(claims.to_csv(claims.table(rows)))
    return pd.read_csv(tmp_path / "claims.csv")


def test_the_best_exact_method_is_named_only_with_its_speed_up():
    assert claim(best_title="an exact one").row()["best_exact"] == ""
    assert claim(best_title="an exact one", best=(0.5, 0.4, 0.6)).row()["best_exact"] == "an exact one"


def test_the_table_has_each_claim_and_its_provenance(table):
    assert list(table.columns) == list(claims.COLUMNS)
    assert list(table["verdict"]) == [REPRODUCED, REPRODUCED, NOT, UNADDRESSED, REPRODUCED]
    assert list(table["git_sha"].fillna("")) == ["abc", "abc", "abc", "", "abc"] and table["machine"][0] == "m; n"
    assert list(table["ratio"].round(3).fillna(0)) == [1, 1.2, 0.1, 0, 1.02]
    shown = claims.readable(table)
    assert [row["published"] for row in shown] == ["10", "> 10", "10", "10", "-0.5"]
    assert shown[1]["measured"] == "12 times (11 to ?; 95 % interval, 5 seeds)" and shown[3]["measured"] == ""
    assert [row["same"] for row in shown] == ["yes", "no", "no", "no", "no"]


# --- the figure and the page


def dots(drawing, marker="o"):
    """Lines with a marker, from top to bottom."""
    (panel,) = drawing.figure.axes
    found = [line for line in panel.lines if line.get_marker() == marker]
    return sorted(found, key=lambda line: line.get_ydata()[0])


def test_each_number_is_a_dot_filled_where_the_setting_is_the_same(table):
    with base.style():
        drawing = verdicts.draw(table)
        drawing.figure.draw_without_rendering()
    assert not [text for text in drawing.figure.axes[0].texts if text.get_text() == "nan×"]
    first, small, power = dots(drawing)
    assert [round(line.get_xdata()[0], 3) for line in (first, small, power)] == [1, 0.1, 1.02]
    filled = [line.get_markerfacecolor() == line.get_color() for line in (first, small, power)]
    assert filled == [True, False, False]
    (best,) = dots(drawing, "D")
    assert best.get_xdata()[0] == 0.05 and first.get_ydata()[0] < best.get_ydata()[0] < small.get_ydata()[0]
    (panel,) = drawing.figure.axes
    assert drawing.figure.texts[0].get_text() == (
        "2 of 3 published numbers and exponents reproduce, each within its band"
    )
    assert "1 of 1 claims that a value is above or below a number reproduce" in drawing.figure.texts[1].get_text()
    spans = [band.get_paths()[0].get_extents() for band in panel.collections]
    assert [(span.x0, span.x1) for span in spans] == [(0.5, 2), (0.5, 2), pytest.approx((0.7071, 1.4142), abs=1e-3)]
    open_ended = next(
        line for line in panel.lines if line.get_ydata()[0] == best.get_ydata()[0] and len(line.get_xdata()) == 2
    )
    assert open_ended.get_xdata()[1] == panel.get_xlim()[1], "an unknown end goes to the edge"
    said = ["figure 1: a number", "over an exact one", "figure 1: a small one", "figure 1: a power"]
    assert [label.get_text() for label in panel.get_yticklabels()] == said


def test_where_no_claim_has_a_number_the_figure_says_so(table):
    with base.style():
        drawing = verdicts.draw(table[table["relation"] != claims.ABOUT])
    assert drawing.figure.texts[0].get_text() == "Nothing to show"


@pytest.mark.slow
def test_figures_are_drawn_with_files_of_their_claims_and_a_section_on_the_page(tmp_path):
    tables = {name: paths.REFERENCE / "paper_cpu" / "studies" / f"{name}.csv" for name in ("novak_flops", "novak_time")}
    made = figures.draw_all(tables, tmp_path)
    assert {outcome.status for outcome in made.values()} == {"ok"}
    table = pd.read_csv(tmp_path / "claims.csv")
    assert list(dict.fromkeys(table["figure"])) == ["novak_flops", "novak_time"]
    assert {"claims.csv", "claims.txt", "claims.png", "claims.pdf"} <= {path.name for path in tmp_path.iterdir()}
    page = report.page(sorted(tmp_path.glob("*.png")), "Two")
    assert page.index(">Reproduction of the papers</h2>") < page.index('id="novak_time"')
    assert page.count('<th scope="row">') == len(table) and page.count('<th scope="col">') == 6
    assert re.search(
        r'<h3 id="(.*?)">All \d+ claims</h3>\s*<div class="scroll" role="region" aria-labelledby="\1"', page
    )
    for sentence in table["statement"]:
        assert sentence in page
    figures.draw_all({"coverage": tmp_path / "nowhere.csv"}, tmp_path)
    assert not list(tmp_path.glob("claims.*")), "claims of figures that are no longer drawn"


def test_texts_of_claims_are_escaped_in_html(table, tmp_path):
    files.write_claims(table, tmp_path)
    page = report.page([tmp_path / "claims.png"], "x")
    assert "it is &lt;i&gt;more" in page and "<i>" not in page and "<b>" not in page


# --- the papers' figures and the committed claims


@functools.cache
def drawn(name):
    """A figure and its checked table, from the committed tables by which the claims are judged."""
    tables = [figures.table_of(name, paths.REFERENCE / profile) for profile in figures.CLAIMED_FROM]
    with base.style():
        return files._drawn(figures.REGISTRY.get(name), files.read(next(table for table in tables if table.exists())))


@pytest.mark.parametrize("name", PAPERS)
def test_captions_are_short_and_have_a_line_for_each_claim(name):
    drawing, table = drawn(name)
    assert len(drawing.caption.split()) <= 60
    first, *lines = base.caption(name, drawing, table, figures.study_of(name)).splitlines()
    assert first == f"{labels.name_label(name)}. {drawing.caption}"
    assert len([line for line in lines if line.startswith("Claim (")]) == len(drawing.claims)
    assert not re.search(r"\bnan\b|\binf\b", "".join([first, *lines]))
    for said, row in zip(drawing.claims, claims.rows(name, drawing.claims, table), strict=True):
        assert said.sentence() in lines and not said.statement[0].isupper() and said.there and said.accuracy
        assert said.runs > 0 or said.verdict == UNADDRESSED
        assert (row["best_exact"] == "") == math.isnan(row["best_ratio"])
        if said.unit == "s" or said.name.startswith("seconds"):
            assert said.same or said.verdict == UNADDRESSED, "seconds of two machines do not compare"


def test_the_title_of_related_metrics_says_what_is_compared():
    title = drawn("hazelden_metrics")[0].title
    assert title.startswith("Hutch++ errors over published ones, at equal share of direct's runtime: squared norm ")


def test_mnists_test_file_is_not_the_papers_setting():
    table = files.read(paths.REFERENCE / "paper_cpu" / "studies" / "hazelden_metrics.csv")
    with base.style():
        figure = figures.REGISTRY.get("hazelden_metrics")
        made = files._drawn(figure, table.assign(problem="mnist_mlp[N=128]"))[0].claims
    assert made and {claim.here for claim in made} == {"MNIST MLP, N = 128"} and not any(claim.same for claim in made)


@pytest.mark.slow
def test_the_committed_claims_are_those_of_the_committed_tables(monkeypatch):
    # Most of the figures have been drawn for their captions.
    monkeypatch.setattr(files, "claimed", lambda name, figure, table: files._claimed(name, *drawn(name)))
    committed = (paths.REFERENCE / "claims.csv").read_text(encoding="utf-8")
    assert claims.to_csv(figures.claims()) == committed, "out of date; `ntkbench claims` updates it"


def test_the_committed_picture_is_that_of_the_committed_claims(tmp_path):
    files.write_claims(pd.read_csv(paths.REFERENCE / "claims.csv"), tmp_path, forms=("png",))
    made, committed = (
        np.asarray(Image.open(folder / "claims.png").convert("L"), float) for folder in (tmp_path, paths.REFERENCE)
    )
    caption = verdicts.draw(pd.read_csv(paths.REFERENCE / "claims.csv")).caption
    assert len(caption.split()) <= 60
    assert made.shape == committed.shape and np.abs(made - committed).mean() < 1, "`ntkbench claims` redraws it"


def test_published_numbers_come_from_stored_files_or_theory():
    """No claim has a number of its own where the published value is stored."""
    table = pd.read_csv(paths.REFERENCE / "claims.csv")
    kept = table["accuracy"].str.contains("read off|printed|three digits|2 %", na=False)
    sentences = table.loc[~kept & table["published"].notna(), "published"]
    blog = pd.read_csv(paths.PUBLISHED / "hazelden_blog.csv")["value"]
    assert set(sentences) - set(blog) == {-0.5, 1.0}


def test_the_command_reports_stale_claims(tmp_path, monkeypatch):
    for profile in ("paper_cpu", "default"):
        (tmp_path / profile / "studies").mkdir(parents=True)
    source = paths.REFERENCE / "paper_cpu" / "studies" / "novak_flops.csv"
    (tmp_path / "default" / "studies" / "novak_flops.csv").write_bytes(source.read_bytes())
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    run = functools.partial(CliRunner().invoke, main)
    stale = run(["claims", "--check"])
    assert stale.exit_code == 1 and "is out of date" in stale.output and not (tmp_path / "claims.csv").exists()
    assert run(["claims"]).exit_code == 0 and run(["claims", "--check"]).exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("claims.*")) == ["claims.csv", "claims.png"]
    rows = pd.read_csv(tmp_path / "default" / "studies" / "novak_flops.csv")
    rows.assign(flops_per_entry=1.0).to_csv(tmp_path / "default" / "studies" / "novak_flops.csv", index=False)
    assert run(["claims", "--check"]).exit_code == 1
