# `make run`  sets everything up and runs the whole pipeline on the built-in sample, service included.
# `make test` sets everything up, lints, type-checks, compiles the CUDA sources and runs the tests.
# `make help` lists the rest.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := pipelines,registry,postgres,ann,grpc,otel,s3,delta,ray,lightning,signing,peers,docs,test
# The extra `spark` has 400 MB, and only slow tests use it.
SLOW_PACKAGES := pyspark
CSRC   := $(shell find kernels/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')
NVCC   ?= $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
# Four workers on two cores: tests wait for processes and disks, and they measure equality, not time.
WORKERS ?= 4
PYTEST_ARGS ?=
MUTATION_ARGS ?= train budget ingest bundle export --sample 60 --seed 1
# Processes of tests read modules as compiled before, also where the environment forbids to keep that.
test test-slow: export PYTHONDONTWRITEBYTECODE =
# Threads of one worker that wait must not take the core that the other works on.
test test-slow: export OMP_WAIT_POLICY = passive
# Folders of tests lie in memory where there is room: they hold little, and what is synced to a disk waits for it.
IN_MEMORY := $(shell room=$$(df --output=avail -k /dev/shm 2>/dev/null | tail -1); \
  [ "$${room:-0}" -gt 8388608 ] && echo PYTEST_DEBUG_TEMPROOT=/dev/shm)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow lint typecheck cuda native sanitize soak mutation gpu system bench screenshots docs clean

help: ## This list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .stamps/installed .stamps/extension ## Virtual environment, dependencies, extension; instant when done.

# Runs a command that nobody reads unless it fails: then all that it printed is shown.
define quietly
@mkdir -p .stamps
@echo "$(1)"
@{ $(2); } > .stamps/log 2>&1 || { status=$$?; cat .stamps/log; exit $$status; }
endef
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lazydp needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

.stamps/installed: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(call quietly,installing the dependencies (some minutes the first time),$(PIP) "setuptools>=77" wheel ninja "$(TORCH)")
	$(call quietly,installing lazydp,$(PIP) --no-build-isolation -e ".[$(EXTRAS)]")
	@touch $@

# The extension lies beside its sources (editable install), so a changed source needs no reinstall.
.stamps/extension: .stamps/installed setup.py $(CSRC)
	$(call quietly,building the extension,$(BIN)/python setup.py --quiet build_ext --inplace)
	@touch $@

run: setup ## The whole pipeline on the built-in sample, then ask the service.
	@rm -rf out/sample
	@$(BIN)/lazydp pipeline run --sample --out out/sample --ask

lint: setup ## ruff: rules and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup ## mypy, strict: the package and its tests.
	$(BIN)/mypy -p lazydp
	$(BIN)/mypy tests

cuda: ## Compile the CUDA sources for sm_80, sm_90 and sm_100 with warnings as errors (no GPU needed).
	@if [ -n "$(NVCC)" ]; then NVCC="$(NVCC)" kernels/csrc/cuda/compile.sh; \
	elif [ -n "$$CI" ]; then echo "cuda: nvcc is missing, and CI must not skip this"; exit 1; \
	else echo "cuda: skipped, no nvcc on this machine"; fi

native: .stamps/native ## Compile the native tests of the kernels, without code; instant when done.

.stamps/native: $(CSRC) $(wildcard tests/kernels/native/*)
	@mkdir -p .stamps
	tests/kernels/native/sanitize.sh --check
	@touch $@

system: ## Debian packages that some tests need (browser, PostgreSQL), where they can be installed.
	@./.ci/system-packages

test: setup system ## Everything that must hold.
	@$(MAKE) --no-print-directory --jobs 3 --output-sync=target lint typecheck cuda native
	$(IN_MEMORY) $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 20 --durations-min 1 $(PYTEST_ARGS)

.stamps/slow: .stamps/installed
	$(call quietly,installing Spark for the slow tests,$(PIP) --no-build-isolation $(SLOW_PACKAGES))
	@touch $@

test-slow: export WITH_JAVA = 1
test-slow: setup .stamps/slow system ## The heavy suite: many kills, many processes, large tables.
	$(IN_MEMORY) $(BIN)/pytest -m slow --timeout 3600 $(PYTEST_ARGS)

soak: setup ## Ten minutes of load, swaps, kills, ledger outages and attacks on a service on loopback.
	$(BIN)/python tests/adversary/soak.py --seconds 600

mutation: setup ## Plant faults in five components, and see whether the tests of their folders notice.
	$(BIN)/python tests/mutation/run.py $(MUTATION_ARGS)

sanitize: ## The CPU kernels' cores under ASan, UBSan and TSan; the CUDA kernels on the host under ASan and UBSan.
	tests/kernels/native/sanitize.sh
	tests/kernels/cuda_host/sanitize.sh

gpu: ## On a machine with an NVIDIA GPU: build, test, sanitize, benchmark; elsewhere one line.
	@tests/kernels/gpu/run.sh

bench: setup ## The figures of docs/benchmarks.md.
	$(BIN)/lazydp bench noise
	$(BIN)/lazydp bench flush
	$(BIN)/lazydp bench step

screenshots: setup system ## The pictures of the service's pages in docs/images.
	PYTHONPATH=tests $(BIN)/python -m support.screenshots

docs: setup ## docs/cli.md from the commands, and the site (build/site) with warnings as errors.
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/build_site.py

clean: ## Remove what was built (the environment too).
	rm -rf $(VENV) .stamps build out *.egg-info kernels/*.so
