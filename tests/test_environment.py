"""The conda environment: it is self-contained, and has the pins of the requirements."""

import re

import yaml

from ntkbench import paths


def pins(file):
    """Requirements of a file, each ``name==version``."""
    lines = (paths.ROOT / file).read_text(encoding="utf-8").splitlines()
    return sorted(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def test_it_names_no_other_file_and_has_the_pins():
    """Snakemake creates it from a copy elsewhere, where relative paths to files of the checkout do not resolve."""
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip"] and set(environment) == {"name", "channels", "dependencies"}
    assert sorted(pip["pip"]) == pins("requirements.txt")
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9A-Za-z.]+", pin) for pin in pip["pip"])


def test_packages_without_their_dependencies_are_installed_afterwards():
    """By the script that Snakemake runs in a new environment, named after its file."""
    script = (paths.ROOT / "environment.post-deploy.sh").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python -m pip install --no-deps (.*)$", script, re.MULTILINE)
    assert sorted(line.split()) == pins("requirements-no-deps.txt")
    assert script.startswith("#!/bin/sh\n") and "set -eu\n" in script
