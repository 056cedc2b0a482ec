"""Run everything that needs a GPU: correctness checks of every path, large networks, and the suite's own measurements.

    python scripts/gpu.py                            all parts, in less than nine minutes on one H100
    python scripts/gpu.py --parts correctness        one part
    python scripts/gpu.py --tiny                     from start to end on a CPU; the numbers mean nothing, and their
                                                     folder is another one

correctness   methods, the API and their limits against float64 on the CPU; one row per case in OUT/correctness.jsonl
large         large networks as fractions of the device's limit, and rivals in turn; one row per case and rival, or
              the reason for each that was not measured, in OUT/large.csv, and the operations that take longest in
              OUT/profiles.txt
study         the grid of config/gpu.yaml through Snakemake and asv, in results/gpu; one row per cell, or the reason
              why an interrupted run has none, in OUT/study.csv

Each part runs in its own processes and is terminated at its time limit, or with this script; the other parts run
regardless. Rows are written as soon as they are known. The device and the versions are in OUT/machine.json. The exit
status is 0 if all parts finished, and no result is wrong or missing. Skipped cases are counted, but do not affect it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # this checkout, whether or not it is installed
PINS = ("requirements.txt", "requirements-no-deps.txt")

SECONDS = {"correctness": 240.0, "large": 240.0, "study": 480.0}
"""Time limit of each part."""
TOLERANCE = 1e-3
"""Largest relative error of an exact method in the study."""
NOT_REACHED = ("failed", "not measured: the run ended first")
"""Status and reason of a cell of the study without a row."""
RESTART = 3
"""Exit status of a process of the first part that lost the device."""
ENVIRONMENT = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")])),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the device is shared
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a device must not start CUDA before a fork
}


def missing() -> dict[str, str]:
    """Pinned packages that are not installed here, each with its version; names in lower case, with hyphens."""
    lines = [line for file in PINS for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {_normal(name): version for name, version in pins.items() if not _installed(name)}


def _installed(name: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(name))
    return False


def needs() -> dict[str, set[str]]:
    """Packages that each part requires, and as ``JAX`` those that only the JAX cases require; names as in pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: _names(listed) for name, listed in project["optional-dependencies"].items()}
    library = _names(project["dependencies"])
    # Some problems use scikit-learn's digits.
    return {
        "correctness": library | {"scikit-learn"},
        "JAX": extras["jax"] | {"neural-tangents"},
        "large": library | extras["jax"] | {"neural-tangents", "transformers"},
        "study": library | extras["jax"] | extras["pipeline"] | {"neural-tangents"},
    }


def _names(requirements: Iterable[str]) -> set[str]:
    return {_normal(re.split(r"[^\w-]", requirement, maxsplit=1)[0]) for requirement in requirements}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def machine() -> dict[str, Any]:
    """Device, driver, clocks, versions and commit; unknown values are left out."""
    asked = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.sm", "clocks.mem", "power.limit")
    said = _output("nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader")
    packages = ("torch", "jax", "jaxlib", "neural-tangents", "numpy")
    return {
        "devices": [dict(zip(asked, line.split(", "), strict=False)) for line in said.splitlines()],
        "versions": {name: importlib.metadata.version(name) for name in packages if _installed(name)},
        "python": sys.version.split()[0],
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "environment": {name: value for name, value in ENVIRONMENT.items() if "PATH" not in name},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _output(*command: str) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def run(commands: Sequence[Sequence[str]], seconds: float) -> bool:
    """Run commands in parallel; returns whether all of them ended in time and without an error.

    At the limit they are killed with all their children. A command that lost the device is started again.

    Args:
        commands: each a program with its arguments.
        seconds: time limit of all commands together.
    """
    end = time.monotonic() + seconds
    pending = {_started(command): command for command in commands}
    good = True
    try:
        while pending and time.monotonic() < end:
            time.sleep(0.05)
            for process in [process for process in pending if process.poll() is not None]:
                command = pending.pop(process)
                if process.returncode == RESTART:
                    pending[_started(command)] = command
                good = good and process.returncode in (0, RESTART)
    finally:
        for process in pending:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return good and not pending


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, start_new_session=True)


def correctness(out: Path, tiny: bool, seconds: float) -> bool:
    """The first part; returns whether all cases were checked and are correct."""
    from ntkbench import ambient

    file = out / "correctness.jsonl"
    file.unlink(missing_ok=True)
    # Compilation takes most of the time, and runs in parallel on the cores.
    shares = max(1, 3 * ambient.cores() // 4)
    case = [sys.executable, str(ROOT / "scripts" / "gpu_correctness.py"), str(file.resolve())]
    options = ["--device", "cpu", "--few"] if tiny else []
    done = run([[*case, *options, "--share", str(share), str(shares)] for share in range(shares)], seconds)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    summary("correctness", done, (row["status"] for row in rows), file)
    return done and all(row["status"] in ("ok", "skipped") for row in rows)


def large(out: Path, tiny: bool, seconds: float) -> bool:
    """The second part; returns whether all cases ran."""
    file = out / "large.jsonl"
    for old in (file, profiles := out / "profiles.txt"):
        old.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / "gpu_large.py"), str(file.resolve())]
    done = run([[*command, "--profile", str(profiles.resolve()), *(["--tiny"] if tiny else [])]], seconds)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    rows = list({(row["case"], row["dtype"]): row for row in rows}.values())  # the last one of each case
    table(rows, machine()).to_csv(out / "large.csv", index=False)
    summary("large", done, (row["status"] for row in rows), out / "large.csv")
    return done and all(row["status"] == "ok" for row in rows)


def table(rows: Iterable[dict[str, Any]], machine: dict[str, Any]) -> Any:
    """A row for each large case and rival, or the reason why it was not measured; with machine, versions and commit."""
    import pandas as pd

    where = {
        "device_name": ", ".join(device["name"] for device in machine["devices"]),
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "git_sha": machine["commit"].removesuffix("-dirty"),
        "git_dirty": machine["commit"].endswith("-dirty"),
    }
    found = []
    for row in rows:
        plain = {name: value for name, value in row.items() if not isinstance(value, dict)}
        seconds, left_out = row.get("rival_seconds", {}), row.get("rivals_left_out", {})
        for rival in {**seconds, **left_out} or {"": None}:
            compared = {"rival": rival, "rival_seconds": seconds.get(rival), "ratio": row.get("ratios", {}).get(rival)}
            found.append({**plain, **compared, "rival_reason": left_out.get(rival), **where})
    return pd.DataFrame(found)


def study(out: Path, tiny: bool, seconds: float) -> bool:
    """The third part; returns whether every cell is measured or skipped, and no exact method is wrong."""
    from ntkbench.measure import rows

    profile = "smoke" if tiny else "gpu"
    file, target = ROOT / "config" / f"{profile}.yaml", f"results/{profile}/table.csv"
    command = [sys.executable, "-m", "snakemake", target, "--cores", "all", "--configfile", str(file)]
    done = run([command], seconds)
    table = rows.read(ROOT / target) if done else measured(file)
    table.to_csv(out / "study.csv", index=False)
    bad = ~table["status"].isin(["ok", "skipped"])
    wrong = bad | ((table["kind"] == "exact") & (table["error"] > TOLERANCE))
    for row in table[wrong].itertuples():
        said = f"relative error {row.error:.2g}" if row.status == "ok" else row.reason
        print(f"study: {row.problem} {row.method} {row.backend} {row.metric}: {said}")
    summary("study", done, table["status"], out / "study.csv")
    return done and not wrong.any()


def measured(file: Path) -> Any:
    """A row for each cell of an interrupted run; those without a valid one are :data:`NOT_REACHED`."""
    from ntkbench.measure import fingerprints, journal, outcomes, rows
    from ntkbench.measure.cells import cells
    from ntkbench.measure.config import Config

    config = Config.read(file)
    known = journal.rows_of((ROOT / "results" / config.folder / "shards").glob("*.journal"))
    found = []
    for cell in cells(config):
        left = {key: getattr(cell, key) for key in outcomes.KEY} | outcomes.Outcome(*NOT_REACHED).columns()
        found.append(known.get((cell.label, fingerprints.cell(config, cell)), left))
    return rows.frame(found)


def summary(part: str, done: bool, statuses: Iterable[str], file: Path) -> None:
    """Print the number of rows of each status, and the file that holds them."""
    count: dict[str, int] = {}
    for status in statuses:
        count[status] = count.get(status, 0) + 1
    said = ", ".join(f"{number} {status}" for status, number in sorted(count.items())) or "no rows"
    print(f"{part}: {said}{'' if done else '; NOT FINISHED'}; see {file}", flush=True)


def _end(number: int, _: object) -> None:
    """End this process by an exception, so that the processes of the part end too."""
    sys.exit(128 + number)


@click.command(help=__doc__)
@click.option("--parts", default=",".join(SECONDS), help="Comma-separated names.")
@click.option("--tiny", is_flag=True, help="On the CPU, at sizes whose numbers mean nothing.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder of the results.  [default: results/gpu, or results/gpu_tiny with --tiny]",
)
@click.option("--time-limit", type=float, default=530.0, help="Seconds for all parts together.")
def main(parts: str, tiny: bool, out: Path | None, time_limit: float) -> None:
    """Print the packages that are missing on this machine, and run the parts."""
    for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
        if signal.getsignal(number) is signal.SIG_DFL:  # else nohup, for example, ignores it
            signal.signal(number, _end)
    begun, chosen = time.monotonic(), parts.split(",")
    out = out or ROOT / "results" / ("gpu_tiny" if tiny else "gpu")
    if unknown := set(chosen) - set(SECONDS):
        raise click.BadParameter(f"unknown parts {', '.join(sorted(unknown))}; allowed: {', '.join(SECONDS)}")
    os.environ.update(ENVIRONMENT)
    out.mkdir(parents=True, exist_ok=True)
    absent, wanted = missing(), needs()
    blocked = {part: sorted(wanted[part] & set(absent)) for part in wanted}
    print("missing here: " + (" ".join(f"{name}=={version}" for name, version in absent.items()) or "nothing"))
    if blocked["JAX"]:
        print(f"what needs {', '.join(blocked['JAX'])} is left out or skipped")
    (out / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    good = True
    for part in chosen:
        if blocked[part]:
            print(f"{part}: not run, it needs {', '.join(blocked[part])}", flush=True)
            good = False
            continue
        seconds = min(SECONDS[part], time_limit - (time.monotonic() - begun))
        try:
            good = {"correctness": correctness, "large": large, "study": study}[part](out, tiny, seconds) and good
        except Exception as error:  # the other parts still run
            print(f"{part}: {type(error).__name__}: {error}", flush=True)
            good = False
    sys.exit(not good)


if __name__ == "__main__":
    main()
