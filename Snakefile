"""From a configuration to tables, figures and a report: problems, the grid's cells, studies, drawing.

snakemake --cores all                                     config/default.yaml
snakemake --cores all --configfile config/smoke.yaml      another configuration
snakemake paper_figures --cores all                       only the figures of studies, such as the papers': config/paper.yaml
snakemake figures --cores all --config source=reference   a configuration's figures from committed tables only
snakemake --cores all --config retry=failed               remeasure what failed, took too long or too much memory
snakemake --report steps.html                             the results of a finished run, in one file
snakemake --workflow-profile profiles/slurm               on a cluster

Targets come before --configfile, which takes all words after it as files.
"""

import contextlib
import functools
import os
import shlex
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import min_version

# The steps run this checkout; the installed package may be that of another one.
sys.path.insert(0, str(Path(workflow.basedir) / "src"))

from ntkbench import errors, paths, studies
from ntkbench.figures.plotting import labels
from ntkbench.measure import cells, config as configuration, fingerprints, progress, shard
from ntkbench.run import Run

min_version("9.0")


report: "report/workflow.rst"


# The run has its own progress line. Snakemake's output, except errors, goes only to its log (.snakemake/log).
said = workflow.logger_manager.settings
if not (said.dryrun or said.verbose or workflow.remote_exec):
    for handler in logger.handlers:
        if handler.name == "DefaultStreamHandler":
            handler.setLevel("ERROR")

ROOT = Path(workflow.basedir)
OWN_PATH = f'PATH={shlex.quote(os.path.dirname(sys.executable))}:"$PATH" '
if DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method:
    OWN_PATH = ""
# NTKBENCH_RUN: steps end when this run ends. PYTHONPATH: they run this checkout, as above.
# PATH: steps use the Python that runs Snakemake, even if its environment is not activated, unless rules have their own.
# Backends share a GPU, and start only in measuring processes.
shell.prefix(
    f"export NTKBENCH_RUN={os.getpid()} PYTHONPATH={shlex.quote(paths.python_path(ROOT))} PYTHONUTF8=1 "
    f"{OWN_PATH}"
    "XLA_PYTHON_CLIENT_PREALLOCATE=false PYTORCH_NVML_BASED_CUDA_CHECK=1; "
)

GIVEN = list(workflow.overwrite_configfiles)
with errors.as_one_line():
    WHOLE = configuration.is_whole(GIVEN, workflow.config_settings.config)
if not WHOLE:

    configfile: ROOT / "config" / "default.yaml"


def read(name):
    """The run of the command line's configuration, or of one in config/ if that is missing or only overrides values."""
    with errors.as_one_line():
        # On a cluster, this machine is not one of those that measure.
        here = workflow.resource_settings.nodes is None and not workflow.remote_exec
        # Read again, since Snakemake's own reader loses duplicate keys and line numbers.
        overrides = workflow.config_settings.config
        made = Run(configuration.Config.of_run(GIVEN, overrides, here, ROOT / "config" / name))
        looks = said.dryrun or workflow.remote_exec or not (made.results / "shards").exists()
        if made.config.source == "measured" and not looks:
            # Tables stay if another run is writing there: this one is then refused when it starts.
            with contextlib.suppress(Timeout), FileLock(made.results / ".lock", timeout=0):
                for file in shard.discard_damaged(made.config, made.results):
                    said_of_it = "is not what its journal and the configuration say, so it is made again"
                    print(f"ntkbench: {file} {said_of_it}", file=sys.stderr)
        return made


RUN = read("default.yaml")


@functools.cache
def paper():
    """The run of the papers' figures: at the papers' sizes, unless a configuration is chosen."""
    return RUN if WHOLE else read("paper.yaml")


def page_of_papers(wildcards):
    """The page of the papers' figures. Its run must have its own folder, since the folder tells jobs their run."""
    made = paper()
    if made is not RUN and made.config.folder == RUN.config.folder:
        with errors.as_one_line():
            raise errors.BadInput(
                f"paper_figures: the profile {made.config.profile!r} is given to config/paper.yaml and to "
                "config/default.yaml alike; leave it out, or give --configfile config/paper.yaml, before other files"
            )
    return made.results / "paper_figures.html"


def run_of(wildcards):
    """The run that a job belongs to."""
    made = RUN if wildcards.profile == RUN.config.folder else paper()
    if wildcards.profile != made.config.folder:
        raise errors.BadInput(f"no configuration of the profile {wildcards.profile} is chosen")
    return made


def step_of(wildcards):
    """A job in the words of :class:`ntkbench.run.Run`."""
    return {name: value for name, value in wildcards.items() if name != "profile"}


def needs(resource):
    """A resource of a job, from the limits of the configuration."""
    return lambda wildcards: getattr(run_of(wildcards).needs(**step_of(wildcards)), resource)


NOW = f"{time.time()}"


def retry(wildcards):
    """A value that no earlier run had, if this one repeats a part of the job; another ``retry`` alone runs nothing."""
    made = run_of(wildcards)
    return NOW if made.config.retry == "failed" and made.may_change(**step_of(wildcards)) else ""


LOCKS, LINES = [], []


def writing():
    """The runs that write something in this call."""
    folders = {job.wildcards.profile: job.wildcards for job in workflow.dag.jobs if "profile" in job.wildcards.keys()}
    return [run_of(wildcards) for wildcards in folders.values()]


onstart:
    # Not earlier, since a dry run writes nothing.
    with errors.as_one_line():
        for each in writing():
            paths.writable(each.results)
            LOCKS.append(FileLock(each.results / ".lock"))
            try:
                LOCKS[-1].acquire(timeout=0)
            except Timeout:
                raise errors.BadInput(
                    f"another run is writing to {each.results}; wait for it, or choose another profile"
                )
            configuration.write(each.config, each.results / "config.yaml")
            LINES.append(progress.Line(each.results, each.expected))
    LINES[0].start()


onsuccess:
    LINES[0].stop(f"ntkbench: done, see {' and '.join(str(each.results) for each in writing())}")


onerror:
    folders = " and ".join(str(each.results) for each in writing())
    LINES[0].stop(f"ntkbench: some steps failed, see logs/ in {folders}; the results of the others are there")


TIMED = "|".join(filter(studies.is_timed, studies.REGISTRY.found()))
# How a report shows the files of a folder of figures.
SHOWN = {
    "patterns": ["{figure}.{form,png|csv}"],
    "caption": "report/figure.rst",
    "category": lambda wildcards: labels.group(wildcards.figure).partition(":")[0],
    "labels": lambda wildcards: {
        "figure": wildcards.figure.replace("_", " "),
        "as": {"png": "picture", "csv": "numbers"}[wildcards.form],
    },
}


wildcard_constraints:
    profile=r"[a-z0-9_-]+",
    number=r"\d+",
    study=rf"(?!({TIMED})\.csv)\w+",


# A timed step has the machine to itself: it takes both timers, other steps take one. A profile cannot give them, since
# --resources on the command line replaces its own. On a cluster, each node is a machine.
workflow.register_resource("timer", 2)


resource_scopes:
    timer="local",


localrules:
    all,
    figures,
    paper_figures,
    table,
    draw,
    draw_paper,


rule all:
    input:
        RUN.measured,
        RUN.results / "report.html",


rule figures:
    input:
        RUN.results / "report.html",


rule paper_figures:
    input:
        page_of_papers,


rule problems:
    output:
        "results/{profile}/problems.json",
    log:
        "results/{profile}/logs/problems.log",
    benchmark:
        "results/{profile}/timings/problems.tsv"
    conda:
        "environment.yml"
    threads: needs("threads")
    resources:
        timer=needs("timer"),
        mem_mb=needs("mem_mb"),
        runtime=needs("runtime"),
        gpu=needs("gpu"),
    params:
        config="results/{profile}/config.yaml",
        retry=retry,
        limits=lambda wildcards: [run_of(wildcards).config.limits.problem_s, run_of(wildcards).config.limits.memory_mb],
        fingerprint=lambda wildcards: fingerprints.combined(map(fingerprints.problem, run_of(wildcards).problems)),
    shell:
        "python -m ntkbench problems --config {params.config:q} --output {output:q} > {log:q} 2>&1"


rule measure:
    input:
        "results/{profile}/problems.json",
    output:
        "results/{profile}/shards/shard-{number}.csv",
    log:
        "results/{profile}/logs/shard-{number}.log",
        cases="results/{profile}/logs/shard-{number}-cases.log",
    benchmark:
        "results/{profile}/timings/shard-{number}.tsv"
    conda:
        "environment.yml"
    threads: needs("threads")
    resources:
        timer=needs("timer"),
        mem_mb=needs("mem_mb"),
        runtime=needs("runtime"),
        gpu=needs("gpu"),
    params:
        config="results/{profile}/config.yaml",
        retry=retry,
        fingerprint=lambda wildcards: run_of(wildcards).made_for.cells(
            cells.of_shard(run_of(wildcards).config, int(wildcards.number))
        ),
    shell:
        "python -m ntkbench measure-shard --config {params.config:q} --shard {wildcards.number} --problems {input:q} "
        "--output {output:q} --log {log.cases:q} > {log[0]:q} 2>&1"


rule table:
    input:
        lambda wildcards: [
            f"results/{wildcards.profile}/shards/shard-{number}.csv" for number in run_of(wildcards).shards
        ],
    output:
        report(
            "results/{profile}/table.csv",
            caption="report/table.rst",
            category="Tables",
            labels={"table": "cells of the grid"},
        ),
    log:
        "results/{profile}/logs/table.log",
    benchmark:
        "results/{profile}/timings/table.tsv"
    conda:
        "environment.yml"
    resources:
        timer=1,
    params:
        config="results/{profile}/config.yaml",
        cells=lambda wildcards: [cell.label for cell in run_of(wildcards).cells],
        fingerprint=lambda wildcards: run_of(wildcards).made_for.table("table"),
    shell:
        "python -m ntkbench table {input:q} --config {params.config:q} --output {output:q} > {log:q} 2>&1"


# A study without timings; such studies may run in parallel.
rule study:
    output:
        report(
            "results/{profile}/studies/{study}.csv",
            caption="report/table.rst",
            category="Tables",
            labels={"table": "study {study}"},
        ),
    log:
        "results/{profile}/logs/study-{study}.log",
    benchmark:
        "results/{profile}/timings/study-{study}.tsv"
    conda:
        "environment.yml"
    threads: needs("threads")
    resources:
        timer=needs("timer"),
        mem_mb=needs("mem_mb"),
        runtime=needs("runtime"),
        gpu=needs("gpu"),
    params:
        config="results/{profile}/config.yaml",
        retry=retry,
        fingerprint=lambda wildcards: run_of(wildcards).made_for.table(wildcards.study),
    shell:
        "python -m ntkbench study {wildcards.study} --config {params.config:q} --output {output:q} > {log:q} 2>&1"


use rule study as timed_study with:
    wildcard_constraints:
        study=TIMED,


rule draw:
    input:
        lambda wildcards: run_of(wildcards).reported,
    output:
        page="results/{profile}/report.html",
        figures=report(directory("results/{profile}/figures"), **SHOWN),
    log:
        "results/{profile}/logs/draw.log",
    benchmark:
        "results/{profile}/timings/draw.tsv"
    conda:
        "environment.yml"
    resources:
        timer=2,
    params:
        captions=lambda wildcards: run_of(wildcards).results / "figures",
        title=lambda wildcards: f"ntkbench: report of the {run_of(wildcards).config.profile} configuration",
        measured=lambda wildcards: [
            run_of(wildcards).made_for.table(f.stem) for f in run_of(wildcards).figures.values()
        ],
        fingerprint=lambda wildcards: fingerprints.combined(map(fingerprints.figure, run_of(wildcards).figures)),
    shell:
        "python -m ntkbench draw {input:q} --title {params.title:q} --figures {output.figures:q} "
        "--output {output.page:q} > {log:q} 2>&1"


use rule draw as draw_paper with:
    input:
        lambda wildcards: sorted(set(run_of(wildcards).of_papers.values())),
    output:
        page="results/{profile}/paper_figures.html",
        figures=report(directory("results/{profile}/paper_figures"), **SHOWN),
    log:
        "results/{profile}/logs/paper_figures.log",
    benchmark:
        "results/{profile}/timings/paper_figures.tsv"
    params:
        captions=lambda wildcards: run_of(wildcards).results / "paper_figures",
        measured=lambda wildcards: [
            run_of(wildcards).made_for.table(f.stem) for f in run_of(wildcards).of_papers.values()
        ],
        fingerprint=lambda wildcards: fingerprints.combined(map(fingerprints.figure, run_of(wildcards).of_papers)),
