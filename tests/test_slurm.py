"""The pipeline on a real Slurm cluster of one node, which is this machine: a second start completes a killed job.

It takes four minutes and needs root, Debian's packages and Snakemake's executor plug-in; it is skipped where one of
them is missing. With ``NTKBENCH_TEST_SLURM=install`` it installs the packages first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import run_snakemake, snakemake

from ntkbench import paths
from ntkbench.measure import cells, rows
from ntkbench.measure.config import Config
from ntkbench.measure.journal import rows_of
from ntkbench.run import BESIDE_MB

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("mungekey", "munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "squeue", "scancel")
PLUGIN = "snakemake_executor_plugin_slurm"
INSTALL = "NTKBENCH_TEST_SLURM"
CONFIGURATION = Path("/etc/slurm/slurm.conf")
"""Slurm's default, since Snakemake's job steps lose ``$SLURM_CONF``."""
MARK = "# written by a test of ntkbench"
MEMORY_MB = 1500
STUDY = {
    "profile": "cluster",
    "device": "cpu",
    "threads": 1,
    "seeds": 3,
    "calls": 1,
    "shards": 2,
    "limits": {"memory_mb": MEMORY_MB},
    "grid": [
        {
            "problems": ["digits_conv[N=3]", "mlp_hazelden[N=2]"],
            "methods": ["one_sided_reverse"],
            "metrics": ["trace"],
            "passes": [12, 24],
        }
    ],
    "studies": {
        "estimators_on_spectra": {"n": 20, "spectra": ["1/i"], "outputs_per_parameter": [1], "passes": [36], "seeds": 3}
    },
}


def why_not() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    if CONFIGURATION.exists() and MARK not in CONFIGURATION.read_text(encoding="utf-8"):
        return f"{CONFIGURATION} is there: this machine belongs to a cluster"
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"{', '.join(missing)} not installed; apt-get install {' '.join(PACKAGES)}, or {INSTALL}=install"
    if importlib.util.find_spec(PLUGIN) is None:
        return f"{PLUGIN} is not installed; pip install ntkbench[slurm]"
    if psutil.virtual_memory().total < (MEMORY_MB + BESIDE_MB) * 2**20:
        return "too little memory for one job"
    return ""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def configuration(folder: Path, host: str) -> str:
    controller, node = free_ports(2)
    memory = psutil.virtual_memory().total // 2**20 - 256
    return f"""{MARK}
ClusterName=ntkbench
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of one node, as long as the module's tests last."""
    if os.environ.get(INSTALL) == "install" and os.geteuid() == 0:
        subprocess.run(["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES], check=True)
    if reason := why_not():
        pytest.skip(reason)
    host = socket.gethostname().partition(".")[0]
    with contextlib.ExitStack() as stack:
        # Paths of sockets are short, and munged refuses folders that others may write to.
        folder = Path("/run") / f"ntkbench-slurm-{os.getpid()}"
        for each in ("state", "spool"):
            (folder / each).mkdir(parents=True)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        CONFIGURATION.parent.mkdir(parents=True, exist_ok=True)
        CONFIGURATION.write_text(configuration(folder, host), encoding="utf-8")
        stack.callback(CONFIGURATION.unlink)
        subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munged = ["munged", "--foreground", "--force", *(f"--{k}={folder}/munge.{v}" for k, v in files.items())]
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            log = stack.enter_context((folder / f"{command[0]}.out").open("w"))
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            time.sleep(1)
        until = time.monotonic() + 30
        while asked("sinfo", "--noheader", "--format=%T") != "idle":
            if time.monotonic() > until:
                said = "; ".join(line for file in folder.glob("*.out") for line in file.read_text().splitlines()[-1:])
                pytest.skip(f"Slurm does not start here: {said}")
            time.sleep(0.5)
        yield
        subprocess.run(["scancel", "--user=root"], check=False)


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def jobs() -> dict[str, tuple[str, str]]:
    """Running jobs: their ids, the rules with their wildcards, and whether they share their node."""
    lines = asked("squeue", "--noheader", "--states=running", "--format=%i %h %k").splitlines()
    return {job: (comment, share) for job, share, comment in (line.split(maxsplit=2) for line in lines)}


def test_a_second_start_completes_a_killed_job(cluster, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    results = tmp_path / "results" / "cluster"
    arguments = ["results/cluster/table.csv", "results/cluster/studies/estimators_on_spectra.csv"]
    arguments += ["--workflow-profile", str(paths.ROOT / "profiles" / "slurm"), "--configfile", str(file)]
    arguments += ["--executor", "slurm", "--jobs", "2", "--retries", "0", "--latency-wait", "10"]
    arguments += ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3"]

    seen: dict[str, tuple[str, str]] = {}
    killed = ""
    with (tmp_path / "first.log").open("w") as log:
        first = snakemake(tmp_path, *arguments, stdout=log, stderr=log)
        while first.poll() is None:
            seen |= jobs()
            measuring = [job for job, (rule, _) in jobs().items() if "rule_measure" in rule]
            begun = [journal for journal in (results / "shards").glob("*.journal") if journal.stat().st_size]
            if measuring and begun and not killed:
                killed = measuring[0]
                subprocess.run(["scancel", "--signal=KILL", "--full", killed], check=True)
            time.sleep(0.2)
    said = (tmp_path / "first.log").read_text(encoding="utf-8")
    assert killed and first.returncode != 0, said[-3000:]
    assert not (results / "table.csv").exists()
    assert (results / "studies" / "estimators_on_spectra.csv").exists(), "one killed job took others with it"
    shared = {rule.partition("_wildcards")[0]: share for rule, share in seen.values()}
    assert shared["rule_measure"] == "NO" and shared["rule_study"] == "OK", shared
    before = set(rows_of((results / "shards").glob("*.journal")))

    code, out, err = run_snakemake(tmp_path, *arguments)
    assert code == 0, (out + err)[-3000:]
    table = rows.read(results / "table.csv")
    assert len(table) == len(cells.cells(Config.read(file))) == 4 and set(table["status"]) == {"ok"}
    assert before <= set(rows_of((results / "shards").glob("*.journal")))
    assert table["machine"].nunique() == 1
