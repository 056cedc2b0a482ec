"""The ``ntkbench`` command: the steps of the pipeline, and information about an installation or a run."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkbench import errors, paths, registry
from ntkbench.measure.config import Config
from ntkbench.methods.base import KINDS, Method, Stochastic
from ntkbench.metrics import METRICS, OF_KERNEL
from ntkbench.units import aligned, counted

if TYPE_CHECKING:
    from ntkbench.measure.cells import Cell
    from ntkbench.trials import Trials


class _New(click.Path):
    """A path to write; refused before any work if it cannot be written."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        try:
            paths.check_output(Path(os.fsdecode(path)), folder=not self.file_okay)
        except errors.BadInput as error:
            self.fail(str(error), param, ctx)
        return path


FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
NEW = _New(path_type=Path, dir_okay=False)
NEW_FOLDER = _New(path_type=Path, file_okay=False)
FACTORY = "MODULE:FUNCTION"


def _of_a_network(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and options of commands on a user's own network."""
    options = (
        click.argument("factory", metavar=FACTORY),
        click.option(
            "--metric", type=click.Choice(METRICS), default="trace", show_default=True, help="Metric of the NTK."
        ),
        click.option(
            "--other",
            metavar=FACTORY,
            help="For an alignment: the function that returns the other network; its inputs and call are not used.",
        ),
        click.option("--device", help="cpu, cuda, cuda:1 or auto.  [default: that of the parameters]"),
        click.option("--dtype", help="float32 or float64.  [default: that of the parameters]"),
        click.option("--memory", type=click.IntRange(min=1), metavar="MIB", help="Memory limit in MiB."),
    )
    for option in reversed(options):
        command = option(command)
    return command


CONFIG = click.option("--config", "config_file", type=FILE, required=True, help="The run's configuration.")
OUTPUT = click.option("--output", type=NEW, required=True, help="The file to write.")


class OneLine(click.Group):
    """Commands that report usage errors on one line, like all other errors."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Run a command, and end with its exit status."""
        try:
            sys.exit(super().main(*args, **more | {"standalone_mode": False}))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            click.echo(f"ntkbench: {error.format_message()}", err=True)
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("ntkbench: interrupted", err=True)
            sys.exit(1)
        except OSError as error:  # such as a full disk behind standard output; click ends quietly at a closed pipe
            click.echo(f"ntkbench: {errors.summary(error)}", err=True)
            with suppress(OSError, ValueError):  # else Python tries again to write what is left, and says so
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


EXAMPLES = """\b
Examples:
  ntkbench recommend my_networks:make --metric norm --rtol 0.01
  ntkbench measure my_networks:make --metric norm --rtol 0.01
  ntkbench compare my_networks:make --metric norm
  ntkbench list --metric norm
  ntkbench run config/smoke.yaml
  ntkbench show results/smoke/table.csv --sort seconds

my_networks.py is in the current folder, and make() in it returns (model, inputs).
"""


@click.group(cls=OneLine, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES)
@click.version_option(package_name="ntkbench")
@click.option(
    "--plugins",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="A folder with methods/, problems/, studies/, figures/ or rules/ of your own.",
)
def main(plugins: tuple[str, ...]) -> None:
    """Metrics of the finite-width Neural Tangent Kernel: of your own network, and a benchmark of methods."""
    with _one_line():
        registry.use(plugins)


@contextmanager
def _one_line() -> Iterator[None]:
    """Print errors that a user can act on, such as a full disk, as one line."""
    with errors.as_one_line():
        yield


@main.command(
    epilog="""\b
Examples:
  ntkbench recommend my_networks:make
  ntkbench recommend my_networks:make --metric effective_rank --rtol 0.05 --device cuda
  ntkbench recommend my_networks:before --metric alignment --other my_networks:after
"""
)
@_of_a_network
@click.option("--rtol", type=float, default=0.01, show_default=True, help="Tolerated relative error.")
def recommend(factory: str, other: str | None, metric: str, rtol: float, **setup: Any) -> None:
    """Predict passes, operations, seconds, memory and error of each method for a network.

    MODULE:FUNCTION is a function without arguments that returns (model, inputs) or (model, inputs, call), as
    ntkbench.Kernel takes them. Errors and budgets are rough; see ntkbench.recommend.
    """
    from ntkbench import api

    with _one_line():
        networks, given = _networks(factory, other, metric, setup)
        model, inputs = networks[0], networks[-1]
        costs = api.recommend(model, inputs, *networks[1:-1], metric=metric, rtol=rtol, **given)
    click.echo(costs)
    more = ["call=call" if key == "call" else f"{key}={value!r}" for key, value in given.items()]
    click.echo(f"\n{costs.code(*more)}" if costs.best else f"\nno method is within rtol={rtol:g}")


@main.command(
    epilog="""\b
Examples:
  ntkbench measure my_networks:make
  ntkbench measure my_networks:make --metric norm --method hutchpp --passes 240
  ntkbench measure my_networks:before --metric alignment --other my_networks:after --rtol 0.05
"""
)
@_of_a_network
@click.option("--method", default="auto", show_default=True, help="Name of a method, as in `ntkbench list`.")
@click.option("--passes", type=int, help="Maximum number of passes.")
@click.option("--rtol", type=float, help="Draw probes until the interval extends at most this fraction to either side.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Confidence level of the interval.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the probes.")
def measure(factory: str, other: str | None, metric: str, **more: Any) -> None:
    """Measure a metric of a network, and print its value, interval, cost and notes.

    MODULE:FUNCTION is as for `ntkbench recommend`.
    """
    from ntkbench import api

    with _one_line():
        setup = {key: more.pop(key) for key in ("device", "dtype", "memory")}
        networks, given = _networks(factory, other, metric, setup)
        found = getattr(api, metric)(*networks, **given, **more)
    click.echo(repr(found))


@main.command(
    epilog="""\b
Examples:
  ntkbench compare my_networks:make
  ntkbench compare my_networks:make --metric norm --passes 64 --method auto --method hutchpp --output norm.csv
  ntkbench compare my_networks:make --report methods.html
"""
)
@_of_a_network
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="A method to measure.  [default: auto, the methods that it tries, hutchinson, hutchpp and sum_of_logits]",
)
@click.option("--passes", type=int, help="Maximum number of passes of stochastic methods.  [default: 64]")
@click.option("--rtol", type=float, help="Tolerance for stochastic methods, instead of a number of passes.")
@click.option("--calls", type=click.IntRange(min=1), default=5, show_default=True, help="Timed calls per method.")
@click.option("--output", type=NEW, help="CSV file for all numbers.")
@click.option("--report", type=NEW, help="HTML file for a page with a picture, all numbers and their provenance.")
def compare(
    factory: str,
    other: str | None,
    metric: str,
    methods: tuple[str, ...],
    passes: int | None,
    rtol: float | None,
    calls: int,
    output: Path | None,
    report: Path | None,
    **setup: Any,
) -> None:
    """Measure values and costs of methods side by side on a network.

    MODULE:FUNCTION is as for `ntkbench recommend`.
    """
    from ntkbench import api

    with _one_line():
        for module in () if report is None else ("jinja2", "matplotlib", "pandas", "PIL"):
            errors.need(module, "ntkbench compare --report", "'.[pipeline]' (in ntkbench's checkout)")
        (model, *others, inputs), given = _networks(factory, other, metric, setup)
        given |= {"other": others[0] if others else None, "metric": metric, "methods": methods or None}
        found = api.compare(model, inputs, passes=passes, rtol=rtol, calls=calls, **given)
        click.echo(found)
        if output is not None:
            paths.write_atomically(output, found.csv())
        if report is not None:
            from ntkbench.figures.plotting import comparison

            title = f"ntkbench: methods for the {metric.replace('_', ' ')} of {factory}"
            paths.write_atomically(
                report, comparison.page(found, title, _provenance(found, model, passes, rtol, setup))
            )


def _provenance(
    found: Trials, model: Any, passes: int | None, rtol: float | None, setup: dict[str, Any]
) -> dict[str, str]:
    """What was measured, where and by which code, for the page of a comparison."""
    import torch

    from ntkbench import trials
    from ntkbench.measure import provenance
    from ntkbench.operators.torch import place
    from ntkbench.options import Target

    here, first = provenance.provenance(), next(model.parameters(), torch.empty(0))
    device = first.device if setup["device"] is None else place(Target(device=setup["device"]))
    budget = f"rtol={rtol:g}" if rtol is not None else f"at most {counted(passes or trials.PASSES, 'pass', 'passes')}"
    dirty = {True: ", with uncommitted changes", False: "", None: ", unknown whether changed"}[here.git_dirty]
    return {
        "network": f"{type(model).__name__}, {counted(sum(w.numel() for w in model.parameters()), 'parameter')}",
        "stochastic methods": budget,
        "calls": f"{max((one.calls for one in found), default=0)}, after a first one",
        "device": f"{device}",
        "dtype": setup["dtype"] or f"{first.dtype}".removeprefix("torch."),
        "threads": f"{torch.get_num_threads()}",
        "machine": here.machine,
        "commit of ntkbench": f"{here.git_sha[:10]}{dirty}",
        "versions": f"{here.versions}, Python {here.python}",
    }


def _networks(
    factory: str, other: str | None, metric: str, setup: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments of the library's functions (network, other network of an alignment, inputs) and keywords.

    Raises:
        BadInput: a factory cannot be used, or an alignment lacks its other network.
    """
    from ntkbench import factory as factories

    if (other is None) == (metric == "alignment"):
        said = "needs a second network: give --other" if other is None else "is of one network: omit --other"
        raise errors.BadInput(f"the {metric} {said}")
    made = factories.make(factory)
    given = {key: value for key, value in setup.items() if value is not None}
    if "memory" in given:
        given["memory"] *= 2**20
    if made.call is not None:
        given["call"] = made.call
    others = [] if other is None else [factories.make(other).model]
    return (made.model, *others, made.inputs), given


@main.command()
@click.argument("config_file", type=FILE)
@click.option("--predict", is_flag=True, help="Also predict the time of the grid, from a few passes on each problem.")
def check(config_file: Path, predict: bool) -> None:
    """Check a configuration, and report what is left to measure, and how long it took last time.

    CONFIG_FILE is the YAML file of a run, such as config/default.yaml.
    """
    from ntkbench.measure import timings
    from ntkbench.run import Run
    from ntkbench.units import seconds_label

    with _one_line():
        run = Run(Config.of_run([config_file]))
        took = timings.known(run.results, run.config.profile)
    click.echo(
        f"{config_file}: profile {run.config.profile}, cells: {len(run.cells)}, studies: {len(run.config.studies)}"
    )
    left = run.expected() if run.config.source == "measured" else {}
    timed, new = ([step for step in left if (step in took) == known] for known in (True, False))
    if timed:
        seconds = seconds_label(sum(took[step] for step in timed))
        click.echo(f"steps without output: {len(timed)}, {seconds} last time")
    if new:
        others = timings.elsewhere(step for step in new if step.startswith("study-"))
        notes = {step: f" ({seconds_label(taken)} in the profile {where})" for step, (taken, where) in others.items()}
        click.echo(f"steps without output, never timed: {', '.join(step + notes.get(step, '') for step in new)}")
    if not predict:
        _warn(run.config, run.cells)
    else:
        from ntkbench.measure import forecast

        with _one_line():
            for line in forecast.summary(run.config, run.cells, lambda label: click.echo(f"... {label}", err=True)):
                click.echo(line)


def _warn(config: Config, cells: Sequence[Cell]) -> None:
    """Warn of a long grid and of cells over the limits, as far as is known without running it."""
    from ntkbench.measure import glance

    with _one_line(), suppress(errors.Unavailable):  # the device is not here
        for line in glance.warnings(config, cells) if config.source == "measured" else ():
            click.echo(line)


@main.command(
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
Examples:
  ntkbench run config/smoke.yaml
  ntkbench run config/default.yaml --cores 4 --config retry=failed
""",
)
@click.argument("config_file", type=FILE)
@click.option("--cores", default="all", show_default=True, help="Number of cores.")
@click.argument("more", nargs=-1, metavar="[SNAKEMAKE OPTIONS]...", type=click.UNPROCESSED)
def run(config_file: Path, cores: str, more: tuple[str, ...]) -> None:
    """Run a study: check its configuration, measure, draw its figures into results/<profile>.

    CONFIG_FILE is the YAML file of the run. The same as `snakemake --cores all --configfile CONFIG_FILE`;
    SNAKEMAKE OPTIONS after the file go to Snakemake. If --config is among them, only the run checks the values.
    """
    with _one_line():
        errors.need("snakemake", "ntkbench run", "'.[pipeline]' (in ntkbench's checkout)")
        root = paths.checkout("ntkbench run")
        if any(option.startswith("--configfile") for option in more):
            raise errors.BadInput("ntkbench run takes one configuration, before Snakemake's options")
        if not any(option in ("-C", "--config") or option.startswith("--config=") for option in more):
            from ntkbench.measure import cells

            config = Config.of_run([config_file], here=False)  # with a profile of Snakemake, other machines measure
            _warn(config, cells.cells(config))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--cores", cores, *more]
    # Snakemake replaces this process, so that it receives interrupts.
    os.execv(sys.executable, [*command, "--configfile", str(config_file)])


@main.command()
@click.argument("config_file", type=FILE)
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    help="The run's results folder.  [default: results/<profile>]",
)
def pending(config_file: Path, results: Path | None) -> None:
    """Count the cells that a run would measure, by method: those without a valid row.

    CONFIG_FILE is the YAML file of the run. With limits.times_exact these include cells that were skipped as too slow,
    which each run predicts again.
    """
    from collections import Counter

    from ntkbench.measure import cells, shard

    with _one_line():
        config = Config.of_run([config_file])
        left = shard.pending(config, results or Path("results") / config.folder)
        total = len(cells.cells(config))
    click.echo(f"{len(left)} of {counted(total, 'cell')}")
    for method, count in sorted(Counter(cell.method for cell in left).items()):
        click.echo(f"{method:32} {count}")


@main.command(hidden=True)
@CONFIG
@OUTPUT
def problems(config_file: Path, output: Path) -> None:
    """Prepare the grid's problems: trained weights and exact metrics."""
    from ntkbench.measure import cells, facts

    with _one_line():
        config = Config.read(config_file)
        labels = sorted({cell.problem for cell in cells.cells(config)})
        made = facts.make(config, labels, output)
    for label, found in made.items():
        click.echo(f"{label}: {found['status']} {found['reason']}")


@main.command(hidden=True)
@CONFIG
@click.option("--shard", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the shard.")
@click.option("--problems", "problems_file", type=FILE, required=True, help="File written by `ntkbench problems`.")
@click.option("--log", type=NEW, required=True, help="File for the output of asv and the methods.")
@OUTPUT
def measure_shard(config_file: Path, shard: int, problems_file: Path, log: Path, output: Path) -> None:
    """Measure the cells of a shard, one row per cell."""
    from ntkbench.measure import shard as measuring

    with _one_line():
        measuring.measure(Config.read(config_file), shard, problems_file, output, log)


@main.command(hidden=True)
@click.argument("shards", nargs=-1, type=FILE, required=True)
@CONFIG
@OUTPUT
def table(shards: tuple[Path, ...], config_file: Path, output: Path) -> None:
    """Combine SHARDS, the files of `ntkbench measure-shard`, into a table with one row per cell."""
    from ntkbench.measure import cells, provenance, rows

    with _one_line():
        config = Config.read(config_file, here=False)
        combined = rows.combine(map(rows.read, shards), cells.cells(config))
        paths.write_atomically(output, combined.to_csv(index=False, lineterminator="\n"))
    click.echo(f"{counted(len(combined), 'cell')}: {combined['status'].value_counts().to_dict()}")
    if said := provenance.several_machines(combined):
        click.echo(said)


@main.command(hidden=True)
@click.argument("name")
@CONFIG
@OUTPUT
def study(name: str, config_file: Path, output: Path) -> None:
    """Measure the study NAME with the settings of the configuration."""
    from ntkbench import studies
    from ntkbench.studies.base import runner

    with _one_line():
        runner.measure(Config.read(config_file, here=studies.is_timed(name)), config_file, name, output)


@main.command(hidden=True)
@click.argument("name")
@CONFIG
@OUTPUT
def study_rows(name: str, config_file: Path, output: Path) -> None:
    """Measure the rows of the study NAME that are not in its journal, in this process."""
    from ntkbench import studies
    from ntkbench.studies.base import runner

    with _one_line():
        # An untimed study uses one thread, regardless of the configuration.
        runner.measure_rows(Config.read(config_file, here=studies.is_timed(name)), name, output)


@main.command(hidden=True)
@click.argument("tables", nargs=-1, type=FILE)
@click.option("--title", required=True, help="Title of the page.")
@click.option("--figures", "folder", type=NEW_FOLDER, required=True, help="Folder for the figures.")
@OUTPUT
def draw(tables: tuple[Path, ...], title: str, folder: Path, output: Path) -> None:
    """Draw the figures of TABLES, CSV files of the grid or of studies, and write the report of these tables alone.

    A figure that cannot be drawn is replaced by the reason.
    """
    _report(tables, title, folder, output)


@main.command(
    epilog="""\b
Examples:
  ntkbench report results/default
  ntkbench report results/reference/default --output report.html --alone
  ntkbench report results/reference/head_to_head results/reference/default --output report.html --alone"""
)
@click.argument("results", type=FOLDER, nargs=-1, required=True)
@click.option("--output", type=NEW, help="The page; report.html in the first of RESULTS if not given.")
@click.option("--alone", is_flag=True, help="Do not keep a folder of figures beside the page.")
def report(results: tuple[Path, ...], output: Path | None, alone: bool) -> None:
    """Draw all figures whose tables are in RESULTS, and write the report: one page of HTML.

    RESULTS are folders with table.csv, or with tables of studies in studies/; a table is taken from the first folder
    that has it. Nothing is measured. Figures go to figures/ beside the page, as PNG, PDF and CSV.
    """
    from ntkbench import figures

    with _one_line():
        found = [file for folder in results for file in (folder / "table.csv", *sorted(folder.glob("studies/*.csv")))]
        tables = list({file.name: file for file in reversed(found) if file.exists()}.values())[::-1]
        if not figures.of_tables(tables):
            folders = " and ".join(map(str, results))
            raise errors.BadInput(f"{folders} has no table to draw a figure from: table.csv, or studies/*.csv")
        page = results[0] / "report.html" if output is None else output
        drawn = page.parent / "figures"
        paths.check_output(page)
        paths.check_output(drawn, folder=True)
    title = f"ntkbench: report of {', '.join(folder.resolve().name for folder in results)}"
    with tempfile.TemporaryDirectory() as folder:
        _report(tables, title, Path(folder) if alone else drawn, page, links=not alone)
    click.echo(page)


def _report(tables: Sequence[Path], title: str, folder: Path, output: Path, *, links: bool = True) -> None:
    """Draw figures into a folder, write the report, and print the outcome of each figure."""
    from ntkbench import figures
    from ntkbench.figures.plotting import claims, files
    from ntkbench.figures.plotting import report as reports

    with _one_line():
        for table in tables:  # before anything is drawn
            files.read(table)
        made = figures.draw_all(figures.of_tables(tables), folder)
        judged = folder / f"{claims.NAME}.png"
        pictures = [folder / f"{name}.png" for name in made] + [judged] * judged.exists()
        beside = Path(os.path.relpath(folder, output.parent)).as_posix() if links else None
        paths.write_atomically(output, reports.page(pictures, title, tables, beside, output.parent))
    for name, outcome in made.items():
        click.echo(f"{name}: {outcome.status} {outcome.reason}".rstrip())


@main.command()
@OUTPUT
def schema(output: Path) -> None:
    """Write the JSON schema of configurations, which editors use to complete and check them."""
    from ntkbench.measure import config

    with _one_line():
        paths.write_atomically(output, config.schema())


@main.command(
    "list",
    epilog="""\b
Examples:
  ntkbench list
  ntkbench list --metric alignment --kind exact
  ntkbench list --backend jax
""",
)
@click.option("--metric", type=click.Choice((*METRICS, *OF_KERNEL)), help="Only methods that compute this metric.")
@click.option("--kind", type=click.Choice(KINDS), help="Only methods of this kind.")
@click.option("--backend", type=click.Choice(["torch", "jax"]), help="Only methods that run on this backend.")
def list_(metric: str | None, kind: str | None, backend: str | None) -> None:
    """List problems, methods and studies; with a filter, only the methods that match.

    The passes of a stochastic method are per probe, one number or one for each metric. Those of other methods are for
    one set of weights, with T steps and a last hidden layer of width d; an alignment takes twice as many; with
    wide_head it takes 3 T d, or 2 T (m + 2 d) with a tied head and m distinct tokens. Methods of neural-tangents count
    no passes.
    """
    from ntkbench import methods, problems, studies

    chosen = metric or kind or backend
    for name in [] if chosen else problems.names():
        click.echo(f"problem  {name:32} {problems.describe(name)}")
    rows = [("method   name", "kind", "backends", "metrics", "passes", "title [source]")]
    for method in map(methods.get, methods.names()):
        if metric not in (None, *method.given) or kind not in (None, method.kind):
            continue
        if backend not in (None, *method.backends):
            continue
        given, backends = method.metrics if metric is None else (metric,), "/".join(method.backends)
        about = f"{method.title} [{method.source}]"
        rows.append((f"method   {method.name}", method.kind, backends, ", ".join(given), _passes(method, given), about))
    click.echo(aligned(rows))
    for name in [] if chosen else studies.names():
        click.echo(f"study    {name:32} {studies.describe(name)}")


def _passes(method: Method, metrics: Sequence[str]) -> str:
    """Passes of a method: per probe, one number or one for each metric; of a deterministic one, a formula."""
    if not isinstance(method, Stochastic):
        return method.passes_formula.replace(" * ", " ")
    each = [f"{method.passes_per_probe(metric)}" for metric in metrics]
    return f"{each[0] if len(set(each)) == 1 else '/'.join(each)} a probe"


@main.command(
    epilog="""\b
Examples:
  ntkbench show results/default/table.csv
  ntkbench show results/default/table.csv --where "metric == 'trace' and error < 0.01" --sort seconds
  ntkbench show results/default/studies/training.csv --columns network,step,alignment
"""
)
@click.argument("file", type=FILE)
@click.option("--where", metavar="EXPRESSION", help="Only rows for which this pandas expression is true.")
@click.option("--columns", metavar="NAMES", help="Separated by commas.  [default: those that tell rows apart]")
@click.option("--sort", metavar="COLUMN", help="Column to sort the rows by.")
@click.option("--rows", type=click.IntRange(min=1), default=40, show_default=True, help="Maximum number of rows.")
def show(file: Path, where: str | None, columns: str | None, sort: str | None, rows: int) -> None:
    """Print the rows of FILE, a table of results in CSV."""
    from ntkbench.measure import view

    with _one_line():
        click.echo(
            view.rows_of(file, where, [each.strip() for each in columns.split(",")] if columns else None, sort, rows)
        )


@main.command()
def doctor() -> None:
    """Report versions, devices, caches and plug-ins of an installation, and what is broken in it."""
    from ntkbench import doctor as looking

    with _one_line():
        found = looking.diagnose()
    for line in found.lines():
        click.echo(line)
    if found.faults:
        sys.exit(1)


@main.command()
@click.argument("labels", nargs=-1, required=True, metavar="LABEL...")
def reference(labels: tuple[str, ...]) -> None:
    """Compute exact values of problems, train their weights, and write both to results/reference.

    LABEL is a problem with or without sizes, such as gru_hazelden[N=4,T=5].
    """
    from ntkbench.problems.base import reference as exact

    with _one_line():
        for record in exact.commit(labels):
            click.echo(f"{record['problem']} {record['metrics']} {record['seconds']} s")


@main.command()
@click.option("--check", is_flag=True, help="Only list what is out of date.")
def readme(check: bool) -> None:
    """Write the measured numbers of the README and of the documentation from the committed tables."""
    from ntkbench import readme as pages

    with _one_line():
        root = paths.checkout("ntkbench readme")
        stale = pages.update(root, check=check)
    for line in stale:
        click.echo(line)
    if check and stale:
        sys.exit(1)


@main.command()
@click.option("--check", is_flag=True, help="Only say whether claims.csv is out of date.")
def claims(check: bool) -> None:
    """Judge the papers' claims by the committed tables, and write results/reference/claims.csv with its picture."""
    from ntkbench import figures
    from ntkbench.figures.plotting import claims as claimed
    from ntkbench.figures.plotting import files

    with _one_line():
        table = figures.claims()
        file = paths.REFERENCE / "claims.csv"
        stale = not file.exists() or file.read_text(encoding="utf-8") != claimed.to_csv(table)
        if not check:
            files.write_claims(table, paths.REFERENCE, forms=("png",))
    for verdict, count in table["verdict"].value_counts().items():
        click.echo(f"{count:3} {verdict}")
    if check and stale:
        click.echo(f"ntkbench: {file} is out of date; `ntkbench claims` updates it", err=True)
        sys.exit(1)


@main.command()
@click.argument("results", type=FOLDER)
def timings(results: Path) -> None:
    """Show where a run spent its time: seconds of each step, and the part of them inside measured calls.

    RESULTS is the folder of the run, such as results/default.
    """
    from ntkbench.measure import timings as spent

    with _one_line():
        click.echo(spent.report(results))


@main.command()
@click.argument("base")
@click.argument("head", default="HEAD")
@click.option("--cases", default="", metavar="REGEX", help="Only cases whose names match.")
def compare_commits(base: str, head: str, cases: str) -> None:
    """Measure two commits in turn; exit status 1 if HEAD is slower, larger or less accurate than BASE.

    BASE and HEAD are names of commits, as git takes them; HEAD is the current one if it is not given.
    """
    from ntkbench.measure import compare as comparison

    with _one_line():
        try:
            passed = comparison.run(base, head, cases)
        except errors.BadInput as error:
            raise click.UsageError(str(error)) from None
    sys.exit(not passed)


if __name__ == "__main__":
    sys.exit(main(prog_name="ntkbench"))
