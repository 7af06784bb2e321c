# Every target sets itself up: .venv, install, build of the C++ kernels. Needs python3 (3.11+), make and, for the kernels, g++.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

.PHONY: demo test lint bench native clean

demo: $(READY)  ## train on real digits, sample, judge; pictures and report under demo/
	$(BIN)/difuse demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .

bench: $(READY)
	$(BIN)/python -m benchmarks.run all $(ARGS)

native: $(READY)  ## rebuild the C++ kernels in place, only what changed
	$(BIN)/python setup.py -q build_ext --inplace

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "difuse needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,bench,test]'
	touch $@

clean:
	rm -rf build .venv *.egg-info engine/*.egg-info kernels/*.egg-info kernels/difuse_kernels/_native*.so
