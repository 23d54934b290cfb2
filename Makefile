# Two commands do everything, on a machine that has Python (3.10 or later) and a C++ compiler:
#   make demo   train on handwritten digits with SGD, RWP, m-RWP, SAM and SSAM, and compare
#   make test   run the whole test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

# Files are shared out over processes of one thread each: tensors in tests are too small for more.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test bench install clean

install: $(VENV)/installed

# torch first: what is there when the extension is built is what it is built against.
$(VENV)/installed: setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch>=2.10"
	$(BIN)/python -m pip install --quiet --editable ".[train,test]"
	@touch $@

demo: ; @$(call timed,demo,$(MAKE) --no-print-directory install && $(BIN)/flatops info && $(BIN)/flatops compare)
test: ; @$(call timed,test,$(MAKE) --no-print-directory install && $(BIN)/flatops info && $(PYTEST))

bench: install
	$(BIN)/flatops bench

clean:
	rm -rf build *.egg-info flatops/*.so runs

timed = start=$$(date +%s); $(2); status=$$?; echo "make $(1): $$(( $$(date +%s) - start )) s, set-up included"; exit $$status
