# On a machine with Python 3.10 or later and a C++ compiler:
#   make demo   train on handwritten digits with SGD, RWP, m-RWP, SAM and SSAM, and compare
#   make test   run the whole test suite
# CONTRIBUTING.md lists the other targets.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
EXTRAS ?= train,test
TESTS ?=
BIN := $(VENV)/bin
SHELL := /bin/bash
CPP := $(shell find csrc tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Single-threaded processes, a test file at a time: tensors in tests are too small for more threads.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test matrix lint docs coverage wheel bench install clean

install: $(VENV)/installed

# torch first: the extension is built against the torch that is installed.
$(VENV)/installed: setup.py pyproject.toml $(filter csrc/%,$(CPP))
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[$(EXTRAS)]"
	@touch $@

demo: ; @$(call timed,demo,$(MAKE) --no-print-directory install && $(BIN)/flatops info && $(BIN)/flatops compare)
test: ; @$(call timed,test,$(MAKE) --no-print-directory install && $(BIN)/flatops info && $(PYTEST) $(TESTS))
matrix: ; @.ci/matrix

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# That test interrupts at any moment: inside coverage's lock, it would deadlock.
coverage: install
	$(PYTEST) --cov -k "not interrupts_by_the_clock"

# flatops is already installed: this adds only the extra's requirements.
$(VENV)/lint $(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet "flatops[$(@F)]"
	@touch $@

# Built from the sdist, which shows that the sdist is complete; installed into an empty folder and imported there.
wheel: install
	rm -rf dist
	$(BIN)/python -m pip install --quiet "setuptools>=77"
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist dist/*.tar.gz
	$(BIN)/python -m pip install --quiet --no-deps --target dist/installed dist/*.whl
	cd dist && PYTHONPATH=installed ../$(BIN)/python -c \
	    "from flatops.backend import _C; assert 'installed' in _C.__file__; print('ok:', _C.__file__)"

bench: install
	$(BIN)/flatops bench

clean:
	rm -rf build dist site *.egg-info flatops/*.so runs

timed = start=$$(date +%s); $(2); status=$$?; \
    echo "make $(1): $$(( $$(date +%s) - start )) s, including setup"; exit $$status
