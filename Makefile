# Two commands: `make results` runs the study and draws the figures, `make test` runs the tests.
# Each does the set-up that it needs. Another study: `make results CONFIG=config/paper.yaml`.

PYTHON ?= python3
CONFIG ?= config/default.yaml
BASE ?=
HEAD ?= HEAD
CASES ?=
COMMITS ?= 485f51b~120..HEAD
STEPS ?= 12
MACHINE ?=
# Relative, since make cannot handle a target or a prerequisite whose path has a space.
VENV := .venv
READY := $(VENV)/ready
# Recipes, and the programs that they start, use the tools of the environment.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: results smoke gpu test test-quick coverage package floors mutants compare history docs lint format clean

results: $(READY)
	python -m ntkbench check '$(CONFIG)'
	snakemake --cores all --configfile '$(CONFIG)'

smoke: CONFIG := config/smoke.yaml
smoke: results

# On a machine with a GPU, with the packages that are installed there.
gpu:
	$(PYTHON) scripts/gpu.py

test: $(READY)
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Without the slowest tests.
test-quick: $(READY)
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not zoo and not slurm'

# The quick tests, and the lines that they do not cover.
coverage: $(READY)
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not zoo and not slurm' --cov=ntkbench --cov-report=term

# The installed package with only its declared dependencies, in a temporary environment outside of the checkout: the
# pinned versions with each of PYTHONS that is on this machine (`package`), or the lowest allowed versions (`floors`).
package: VERSIONS := requirements.txt
package: PYTHONS := python3.11 python3.12 python3.13
floors: VERSIONS := requirements-floors.txt
floors: PYTHONS := $(PYTHON)
package floors:
	@$(PYTHON) --version > /dev/null
	@set -e; folder=; trap 'rm -rf "$$folder"' EXIT; trap 'exit 1' INT TERM; \
	for python in $(PYTHONS); do \
		version=$$($$python --version 2> /dev/null) || { echo "skipped $$python, which is not on this machine"; continue; }; \
		echo "installing ntkbench with $$version and the versions of $(VERSIONS)"; \
		folder=$$(mktemp -d); \
		$$python -m venv "$$folder/venv"; \
		"$$folder/venv/bin/python" -m pip install --quiet --constraint $(VERSIONS) .; \
		cp scripts/quickstart.py "$$folder"; \
		(cd "$$folder" && env -u PYTHONPATH venv/bin/python quickstart.py); \
		rm -rf "$$folder"; \
	done

mutants: $(READY)
	python tests/mutants.py

# Whether HEAD is slower, larger or less accurate than BASE: make compare BASE=<commit> [HEAD=<commit>] [CASES=<regex>].
compare: $(READY)
	python -m ntkbench compare-commits $(if $(BASE),'$(BASE)' '$(HEAD)') --cases '$(CASES)'

# asv's suite over STEPS of the COMMITS, except those measured before, and its page. MACHINE is the name of this machine
# on the page, by default its host name.
history: $(READY)
	asv machine --yes $(if $(MACHINE),--machine '$(MACHINE)')
	asv run --skip-existing-commits --steps $(STEPS) $(if $(MACHINE),--machine '$(MACHINE)') '$(COMMITS)'
	asv publish
	python -m pip install --quiet asv-tachyon==0.5.8 # needs nothing else, and nothing else needs it
	asv-tachyon install results/asv-html

# The documentation as web pages in site/, which load nothing from elsewhere. Warnings are errors.
docs: $(READY) $(VENV)/docs-ready
	python -m sphinx -b html --fail-on-warning --keep-going docs site

lint: $(READY)
	ruff check
	ruff format --check
	mypy
	codespell
	snakefmt --check Snakefile
	snakemake --lint
	asv check --python=same

format: $(READY)
	ruff check --fix
	ruff format
	snakefmt Snakefile

$(READY): requirements.txt requirements-no-deps.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'ntkbench needs Python 3.11 or newer; name one with make PYTHON=...')"
	@echo "setting up .venv with the packages of requirements.txt: a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements-no-deps.txt -e .
	touch $@

$(VENV)/docs-ready: $(READY) requirements-docs.txt
	$(VENV)/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv build .snakemake .asv site docs/methods.md results/smoke results/default results/asv* results/cache
