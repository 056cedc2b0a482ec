"""The comparison on one screen: a configuration's cells, one asv shard a method, one tidy table, studies, the figures.

snakemake --cores all                                  config/default.yaml
snakemake --cores all --configfile config/smoke.yaml   another one
snakemake --cores all paper_figures                    the papers' figures and their studies alone: config/paper.yaml
snakemake --cores all figures --config source=reference   a configuration's figures from committed tables: nothing is measured
snakemake --cores all side_by_side                     methods and products in turn: ratios of times
snakemake --cores all time_to_error                    all methods at the budget that reaches an error, in turn
"""

import shlex
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from snakemake.utils import min_version

from ntkbench import errors, figures, paths, registry
from ntkbench.measure import grid

min_version("9.0")

ROOT = Path(workflow.basedir)
# The asv suite is a folder of the checkout and not installed; what is installed may be another checkout.
# asv takes PYTHONPATH's folders off its path, even those of an editable install, unless its own variable names them.
shell.prefix(
    "".join(f"export {name}={shlex.quote(f'{ROOT}:{ROOT}/src')}; " for name in ("PYTHONPATH", "ASV_PYTHONPATH"))
)

if "grid" not in config:
    # Who asks for the papers' figures wants the papers' sizes. Targets are no part of `workflow` while it is read.
    paper = "paper_figures" in sys.argv

    configfile: ROOT / "config" / ("paper.yaml" if paper else "default.yaml")


with errors.as_one_line():
    STUDY = grid.Config.check(config, ", ".join(map(str, workflow.configfiles)))
    CELLS = grid.cells(STUDY)
    RESULTS = paths.writable(Path("results") / STUDY.folder)
    TABLES = STUDY.tables(RESULTS)
    CONFIG = grid.write(STUDY, RESULTS / "config.yaml")

METHODS = sorted({cell.method for cell in CELLS})
TABLE = [TABLES / "table.csv"] if CELLS else []
# What each figure is drawn from: the results table, or that of a study; of committed tables only those that are kept.
FIGURES = {name: figures.study_of(name) for name in figures.names()}
FIGURES = {
    name: f"studies/{study}.csv" if study else "table.csv"
    for name, study in FIGURES.items()
    if (study in STUDY.studies if study else CELLS)
}
FIGURES = {
    name: TABLES / table for name, table in FIGURES.items() if STUDY.source == "measured" or (TABLES / table).exists()
}

if workflow.is_main_process:
    LOCK = FileLock(RESULTS / ".lock")
    try:
        LOCK.acquire(timeout=0)
    except Timeout:
        sys.exit(f"ntkbench: another run is writing to {RESULTS}; wait for it, or choose another profile")


wildcard_constraints:
    problem=r"[^/]+",
    method=r"\w+",
    figure=r"\w+",
    study=r"\w+",


rule all:
    input:
        TABLE,
        RESULTS / "gallery.html",


rule figures:
    input:
        RESULTS / "gallery.html",


rule paper_figures:
    input:
        expand(
            RESULTS / "figures" / "{figure}.png",
            figure=[name for name, table in FIGURES.items() if table.name != "table.csv"],
        ),


rule problem:
    output:
        RESULTS / "problems" / "{problem}.json",
    log:
        RESULTS / "logs" / "problem-{problem}.log",
    conda:
        "environment.yml"
    resources:
        timer=1,
    params:
        fingerprint=lambda wildcards: grid.problem_fingerprint(wildcards.problem),
    shell:
        "python -m ntkbench problem {wildcards.problem:q} --output {output:q} > {log:q} 2>&1"


rule measure:
    input:
        lambda wildcards: [
            RESULTS / "problems" / f"{label}.json"
            for label in sorted({cell.problem for cell in CELLS if cell.method == wildcards.method})
        ],
    output:
        RESULTS / "shards" / "{method}.csv",
    log:
        RESULTS / "logs" / "asv-{method}.log",
    conda:
        "environment.yml"
    resources:
        timer=1,
    params:
        config=CONFIG,
        fingerprint=lambda wildcards: grid.fingerprint(STUDY, wildcards.method, ROOT / "benchmarks"),
    shell:
        "python -m benchmarks.shard --config {params.config:q} "
        "--method {wildcards.method} --output {output:q} --log {log:q}"


rule side_by_side:
    input:
        RESULTS / "side_by_side.csv",


rule time_to_error:
    input:
        RESULTS / "time_to_error.csv",


rule compare:
    output:
        RESULTS / "{comparison}.csv",
    log:
        RESULTS / "logs" / "{comparison}.log",
    wildcard_constraints:
        comparison="side_by_side|time_to_error",
    conda:
        "environment.yml"
    resources:
        timer=1,
    params:
        threads=STUDY.threads,
        fingerprint=grid.sources_fingerprint(
            *(
                f"ntkbench.{room}.{name}"
                for room in ("methods", "problems")
                for name in registry.names(f"ntkbench.{room}")
            )
        ),
    shell:
        "python -m benchmarks.comparisons.{wildcards.comparison} --threads {params.threads} --output {output:q} > {log:q} 2>&1"


rule table:
    input:
        expand(RESULTS / "shards" / "{method}.csv", method=METHODS),
    output:
        RESULTS / "table.csv",
    log:
        RESULTS / "logs" / "table.log",
    conda:
        "environment.yml"
    params:
        config=CONFIG,
        cells=len(CELLS),
    shell:
        "python -m ntkbench table {input:q} --config {params.config:q} --output {output:q} > {log:q} 2>&1"


rule study:
    output:
        RESULTS / "studies" / "{study}.csv",
    log:
        RESULTS / "logs" / "study-{study}.log",
    conda:
        "environment.yml"
    resources:
        timer=1,
    params:
        config=CONFIG,
        fingerprint=lambda wildcards: grid.study_fingerprint(STUDY, wildcards.study),
    shell:
        "python -m ntkbench study {wildcards.study} --config {params.config:q} --output {output:q} > {log:q} 2>&1"


rule figure:
    input:
        lambda wildcards: FIGURES[wildcards.figure],
    output:
        multiext(str(RESULTS / "figures" / "{figure}"), ".png", ".pdf", ".csv", ".txt"),
    log:
        RESULTS / "logs" / "figure-{figure}.log",
    conda:
        "environment.yml"
    params:
        fingerprint=lambda wildcards: grid.figure_fingerprint(wildcards.figure),
        folder=RESULTS / "figures",
    shell:
        "python -m ntkbench.figures {input:q} --only {wildcards.figure} --out {params.folder:q} > {log:q} 2>&1"


rule gallery:
    input:
        expand(RESULTS / "figures" / "{figure}.png", figure=FIGURES),
    output:
        RESULTS / "gallery.html",
    log:
        RESULTS / "logs" / "gallery.log",
    conda:
        "environment.yml"
    params:
        title=f"ntkbench: figures of the {STUDY.profile} configuration",
        fingerprint=grid.sources_fingerprint("ntkbench.figures.plotting.gallery"),
    shell:
        "python -m ntkbench gallery {input:q} --title {params.title:q} --output {output:q} > {log:q} 2>&1"
