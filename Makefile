# `make run` and `make test` need only Python >= 3.11, pip, make and git: each makes .venv and installs what it needs.

# The first run, sized to end within about five minutes on two cores: a narrow model, and a warm-up and a weight average
# short enough for so few epochs. `make run EPOCHS=15 HIDDEN_SIZE=64` trains longer; the config alone is the study's run.
CONFIG        ?= examples/cmapss/fd002_gaba.toml
EPOCHS        ?= 4
HIDDEN_SIZE   ?= 16
WARMUP_EPOCHS ?= 2
EMA_DECAY     ?= 0.99
OVERRIDES     ?= training.epochs=$(EPOCHS) training.warmup_epochs=$(WARMUP_EPOCHS) \
                 training.ema_decay=$(EMA_DECAY) backbone.hidden_size=$(HIDDEN_SIZE)

# For example `make run RUN_ARGS=--fresh`, once the NASA files are there and the run on simulated ones is to be set aside.
RUN_ARGS      ?=

# Two test processes of one thread each; OpenMP threads that spin while they wait take the core from the other one.
TEST_WORKERS ?= 2
TEST_ENV     := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PYTEST_ARGS  ?=

# For example `make torture TORTURE_ARGS='--seed 5 --kills 1000'`.
TORTURE_ARGS ?=
DRIVER_ARGS  ?=

# For example `make bench BENCH_ARGS='--quick --libmtl ~/src/LibMTL'`.
BENCH_ARGS ?=

VENV   := .venv
PYTHON := $(VENV)/bin/python
TYPED  := examples/cmapss/mtlbalance_cmapss examples/minimal examples/recipes benchmarks docs \
          plugins/mtlbalance-ray/mtlbalance_ray plugins/mtlbalance-submitit/mtlbalance_submitit

.PHONY: help run test test-plugins lint torture bench clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

# The run is named after the config and every override, so that runs with other settings never share a folder.
run: $(VENV)/.installed  ## train GABA on C-MAPSS FD002, shortened; results go to runs/
	@set -- $(OVERRIDES); \
	name=$$(printf '%s' "$(basename $(notdir $(CONFIG)))$${*:+-$$*}" \
	    | sed 's/[a-z_]*\.\([a-z_]*\)=/\1-/g' | tr -cs 'A-Za-z0-9_.-' '-'); \
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/mtlbalance run $(CONFIG) run.output_dir=runs run.name="$$name" "$$@" $(RUN_ARGS)

test: lint  ## lint, types and every test
	$(TEST_ENV) $(PYTHON) -m pytest -n $(TEST_WORKERS) --dist=worksteal $(PYTEST_ARGS)

test-plugins: $(VENV)/.installed-dev  ## install the plugins in plugins/ (Ray among them) and run their tests for real
	$(PYTHON) -m pip install --quiet -c constraints.txt './plugins/mtlbalance-ray[test]' './plugins/mtlbalance-submitit[test]'
	$(TEST_ENV) $(PYTHON) -m pytest plugins $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## ruff and strict mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=examples/cmapss:plugins/mtlbalance-ray:plugins/mtlbalance-submitit $(VENV)/bin/mypy $(TYPED)

torture: $(VENV)/.installed-dev  ## kill, stop, damage, race and starve real runs: the long form of tests/torture
	$(TEST_ENV) $(PYTHON) tests/torture/torture.py --json runs/torture.json $(TORTURE_ARGS)
	$(TEST_ENV) $(PYTHON) tests/torture/drivers.py --json runs/torture_drivers.json $(DRIVER_ARGS)

bench: $(VENV)/.installed-dev  ## what balancing costs, as ratios, beside the peers (BENCH_ARGS=--quick: minutes)
	$(PYTHON) -m pip install --quiet -c constraints.txt --group bench
	$(TEST_ENV) $(PYTHON) benchmarks/suite.py $(BENCH_ARGS)

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and through constraints.txt, so that nothing else decides which build is installed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(PYTHON)
	$(PYTHON) -m pip install --quiet --upgrade 'pip>=25.1'
	$(PYTHON) -m pip install --quiet -c constraints.txt torch
	$(PYTHON) -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PYTHON) -m pip install --quiet -c constraints.txt --group dev
	@touch $@

$(PYTHON):
	@for candidate in python3 python3.13 python3.12 python3.11 python; do \
	    if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "making $(VENV) with $$($$candidate --version)"; \
	        exec $$candidate -m venv --clear $(VENV); \
	    fi; \
	done; \
	echo 'error: no Python >= 3.11 with the venv module was found.' >&2; \
	echo '       Install one (on Debian and Ubuntu: apt install python3 python3-venv) and try again.' >&2; \
	exit 2
