# The two commands that matter: `make demo` and `make test`. Both need Python >= 3.11 and a package index, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# One thread per process: the models are small, and a simulation runs several processes side by side.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow test-docker check format lint types tests .package docs kernels bench config picture clean

demo: $(VENV)/.user
	$(BIN)/python examples/both_runtimes.py

test: lint types tests

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev .package
	$(BIN)/mypy

# The package as it is when installed, by links, for what reads code without running it: mypy, the pages, editors.
.package:
	mkdir -p $@/quickbloom
	ln -sfn $(addprefix ../../,common server_app client_app) $(addprefix ../../,$(wildcard quickbloom/*.py)) $@/quickbloom/

tests: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not docker and not slow" --ignore tests/integration -n 2 --dist loadfile
	$(BIN)/python -m pytest -m "not docker and not slow" tests/integration -n 2 --dist loadfile

# What `make test` leaves out: whole federations, other releases of Flower, the longer examples.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not docker and slow" -n 2 --dist loadfile

# For the work in between: format, lint, types, and the tests beside the files that changed.
check: $(VENV)/.dev .package
	$(BIN)/ruff format .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tests/changed.py | xargs --no-run-if-empty $(BIN)/python -m pytest -m "not docker and not slow" -n 2 --dist loadfile

# With containers, in a real engine; as root on Debian it installs and starts one.
test-docker: $(VENV)/.dev
	sh docker/engine.sh
	$(BIN)/python -m pytest tests/docker -rs

# Speed, on a machine that does nothing else: the engine against plain loops and other libraries, rounds, simulations, a
# deployment, containers where there is an engine. The Pythons of environments with other libraries: make bench
# PEERS="PATH PATH" (docs/performance.md).
bench: $(VENV)/.dev
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 $(BIN)/python -m benchmarks.engine
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 $(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.peers $(addprefix --peer-python ,$(PEERS))
	$(BIN)/python -m benchmarks.rounds
	$(BIN)/python -m benchmarks.simulation
	$(BIN)/python -m benchmarks.deployment
	$(BIN)/python -m benchmarks.containers --if-possible

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pages of docs/ as a site in ./site, readable from disk; every warning is an error.
docs: $(VENV)/.docs .package
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wheels of quickbloom-kernels for all machines, in ./dist.
kernels: $(VENV)/.dev
	$(BIN)/python -m kernels.build_wheels

# Write every setting and its default into pyproject.toml and docs/configuration.md, after a change of the settings models.
config: $(VENV)/.user
	$(BIN)/python -m quickbloom.common.config.write_toml
	$(BIN)/python -m quickbloom.common.config.write_reference

# The picture of a report that the README shows, from a run of its own.
picture: $(VENV)/.dev
	sh tests/programs.sh
	$(BIN)/python docs/images/report_picture.py

# torch first and by itself: with it in place, nothing that follows fetches another build of it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch>=2.6,<2.14"
	touch $@

$(VENV)/.user: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[simulation,datasets,report]"
	touch $@

$(VENV)/.docs: $(VENV)/.user pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[simulation,datasets,report,docs]"
	touch $@

$(VENV)/.dev: $(VENV)/.user pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[simulation,datasets,report,privacy,docs,dev]"
	touch $@

clean:
	rm -rf $(VENV) .package .mypy_cache .ruff_cache .pytest_cache .hypothesis
