"""From a configuration to tables, figures and a page that shows them: problems, the grid's cells, studies, drawing.

snakemake --cores all                                     config/default.yaml
snakemake --cores all --configfile config/smoke.yaml      another one
snakemake paper_figures --cores all                       the papers' figures and their studies alone: config/paper.yaml
snakemake figures --cores all --config source=reference   a configuration's figures from committed tables alone
snakemake --cores all --config retry=failed               measure again what failed, took too long or too much memory

Targets come before --configfile, which takes all that follows it as files.
"""

import os
import shlex
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import min_version

from ntkbench import errors, figures, paths, studies
from ntkbench.measure import cells, config as configuration, fingerprints, progress, timings

min_version("9.0")

# The run's own line says how far it is. What Snakemake says, but for errors, goes to its log alone (.snakemake/log).
said = workflow.logger_manager.settings
if not (said.dryrun or said.verbose):
    for handler in logger.handlers:
        if handler.name == "DefaultStreamHandler":
            handler.setLevel("ERROR")

ROOT = Path(workflow.basedir)
OWN_PATH = f'PATH={shlex.quote(os.path.dirname(sys.executable))}:"$PATH" '
if DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method:
    OWN_PATH = ""
# The steps of this run belong to it: they end when it does. What is installed may be another checkout than this one.
# They run in the Python that runs Snakemake, whether or not its environment is activated, unless rules have their own.
# Backends share a GPU, and are only begun in the processes that measure.
shell.prefix(
    f"export NTKBENCH_RUN={os.getpid()} PYTHONPATH={shlex.quote(paths.python_path(ROOT))} PYTHONUTF8=1 "
    f"{OWN_PATH}"
    "XLA_PYTHON_CLIENT_PREALLOCATE=false PYTORCH_NVML_BASED_CUDA_CHECK=1; "
)

if "grid" not in config:
    # Who asks for the papers' figures wants the papers' sizes. Targets are no part of `workflow` while it is read.
    paper = "paper_figures" in sys.argv

    configfile: ROOT / "config" / ("paper.yaml" if paper else "default.yaml")


with errors.as_one_line():
    # Read again, since Snakemake's own reading loses what is given twice, and lines.
    chosen = workflow.overwrite_configfiles
    files = [file for file in workflow.configfiles if file not in chosen] + list(chosen)
    RUN = configuration.Config.of_files(files, workflow.config_settings.config)
    CELLS = cells.cells(RUN)
    paths.check_folder(Path("results") / RUN.folder)
    TABLES = RUN.tables(Path("results") / RUN.folder)

RESULTS = Path("results") / RUN.folder
PROBLEMS = sorted({cell.problem for cell in CELLS})
SHARDS = [number for number in range(RUN.shards) if cells.of_shard(RUN, number)]
TABLE = [TABLES / "table.csv"] if CELLS else []
# What each figure is drawn from: the grid's table, or that of a study; of committed tables only those that are kept.
FIGURES = {}
for name in figures.names():
    study = figures.study_of(name)
    if study in RUN.studies if study else CELLS:
        file = TABLES / (f"studies/{study}.csv" if study else "table.csv")
        if RUN.source == "measured" or file.exists():
            FIGURES[name] = file
MADE_FOR = fingerprints.Run(RUN, CELLS)
PAGES = {"gallery": FIGURES, "paper_figures": {n: f for n, f in FIGURES.items() if f.name != "table.csv"}}
CONFIG = RESULTS / "config.yaml"
LOCK = FileLock(RESULTS / ".lock")
# Steps whose outputs are there count only once they begin.
STEPS = {"problems": RESULTS / "problems.json", "gallery": RESULTS / "gallery.html"}
STEPS |= {f"shard-{number}": RESULTS / "shards" / f"shard-{number}.csv" for number in SHARDS}
STEPS |= {f"study-{study}": RESULTS / "studies" / f"{study}.csv" for study in RUN.studies}
LINE = progress.Line(
    RESULTS,
    lambda: timings.expected(RESULTS, RUN.profile, [step for step, output in STEPS.items() if not output.exists()]),
)


onstart:
    # Not before, since a dry run writes nothing.
    with errors.as_one_line():
        paths.writable(RESULTS)
        try:
            LOCK.acquire(timeout=0)
        except Timeout:
            raise errors.BadInput(f"another run is writing to {RESULTS}; wait for it, or choose another profile")
        configuration.write(RUN, CONFIG)
    LINE.start()


onsuccess:
    LINE.stop(f"ntkbench: done; look at {RESULTS}")


onerror:
    LINE.stop(f"ntkbench: some steps failed, see {RESULTS}/logs; what could be done is in {RESULTS}")


wildcard_constraints:
    number=r"\d+",
    study=r"\w+",
    page="gallery|paper_figures",


rule all:
    input:
        TABLE,
        [TABLES / "studies" / f"{study}.csv" for study in RUN.studies if RUN.source == "measured"],
        RESULTS / "gallery.html",


rule figures:
    input:
        RESULTS / "gallery.html",


rule paper_figures:
    input:
        RESULTS / "paper_figures.html",


rule problems:
    output:
        RESULTS / "problems.json",
    log:
        RESULTS / "logs" / "problems.log",
    benchmark:
        RESULTS / "timings" / "problems.tsv"
    conda:
        "environment.yml"
    resources:
        timer=1,
    params:
        config=CONFIG,
        retry=RUN.retry,
        limits=[RUN.limits.problem_s, RUN.limits.memory_mb],
        fingerprint=fingerprints.combined(map(fingerprints.problem, PROBLEMS)),
    shell:
        "python -m ntkbench problems --config {params.config:q} --output {output:q} > {log:q} 2>&1"


rule measure:
    input:
        RESULTS / "problems.json",
    output:
        RESULTS / "shards" / "shard-{number}.csv",
    log:
        RESULTS / "logs" / "shard-{number}.log",
        cases=RESULTS / "logs" / "shard-{number}-cases.log",
    benchmark:
        RESULTS / "timings" / "shard-{number}.tsv"
    conda:
        "environment.yml"
    resources:
        timer=2,
    params:
        config=CONFIG,
        retry=RUN.retry,
        fingerprint=lambda wildcards: MADE_FOR.cells(cells.of_shard(RUN, int(wildcards.number))),
    shell:
        "python -m ntkbench measure --config {params.config:q} --shard {wildcards.number} --problems {input:q} "
        "--output {output:q} --log {log.cases:q} > {log[0]:q} 2>&1"


rule table:
    input:
        expand(RESULTS / "shards" / "shard-{number}.csv", number=SHARDS),
    output:
        RESULTS / "table.csv",
    log:
        RESULTS / "logs" / "table.log",
    conda:
        "environment.yml"
    params:
        config=CONFIG,
        cells=[cell.label for cell in CELLS],
        retry=RUN.retry,
        fingerprint=lambda wildcards: MADE_FOR.table("table"),
    shell:
        "python -m ntkbench table {input:q} --config {params.config:q} --output {output:q} > {log:q} 2>&1"


rule study:
    output:
        RESULTS / "studies" / "{study}.csv",
    log:
        RESULTS / "logs" / "study-{study}.log",
    benchmark:
        RESULTS / "timings" / "study-{study}.tsv"
    conda:
        "environment.yml"
    resources:
        timer=lambda wildcards: 2 if studies.is_timed(wildcards.study) else 1,
    params:
        config=CONFIG,
        retry=RUN.retry,
        fingerprint=lambda wildcards: MADE_FOR.table(wildcards.study),
    shell:
        "python -m ntkbench study {wildcards.study} --config {params.config:q} --output {output:q} > {log:q} 2>&1"


rule draw:
    input:
        lambda wildcards: sorted(set(PAGES[wildcards.page].values())),
    output:
        RESULTS / "{page}.html",
    log:
        RESULTS / "logs" / "{page}.log",
    benchmark:
        RESULTS / "timings" / "{page}.tsv"
    conda:
        "environment.yml"
    resources:
        timer=2,
    params:
        names=lambda wildcards: sorted(PAGES[wildcards.page]),
        tables=TABLES,
        title=f"ntkbench: figures of the {RUN.profile} configuration",
        measured=lambda wildcards: [MADE_FOR.table(file.stem) for file in PAGES[wildcards.page].values()],
        fingerprint=lambda wildcards: fingerprints.combined(map(fingerprints.figure, PAGES[wildcards.page])),
    shell:
        "python -m ntkbench draw {params.names} --tables {params.tables:q} --title {params.title:q} --output {output:q} "
        "> {log:q} 2>&1"
