# Every target sets itself up: .venv, install, build of the C++ kernels. Needs python3 (3.11+), make and, for the kernels, g++.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
PART ?=

TRITON_OLDEST := 3.6.0
OLDEST := build/triton-$(TRITON_OLDEST)

.PHONY: demo test lint equivalence schedulers bench kernels oldest-triton sanitize gpu gpu-dry native clean

demo: $(READY)  ## train on real digits, sample, judge; pictures and report under demo/
	$(BIN)/difuse demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .

equivalence: $(READY)  ## accelerated models of other libraries against the unmodified ones: docs/equivalence.md
	$(BIN)/python -m benchmarks.equivalence $(ARGS)

schedulers: $(READY)  ## fused diffusers schedulers against diffusers' own: 200 drawn configurations of each class
	DIFUSE_SCHEDULERS=200 $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_schedulers.py -k trajectories $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks.run all $(ARGS)

kernels: $(READY)  ## read what the compilers make of the GPU kernels, no GPU needed, and fail on spills
	$(BIN)/python -m benchmarks.cuda_report --check
	env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.kernel_report --quick --check $(ARGS)

oldest-triton: $(READY)  ## the same, and every kernel once, on the oldest Triton that is promised
	test -d $(OLDEST) || $(BIN)/pip install -q --no-deps --target $(OLDEST) triton==$(TRITON_OLDEST)
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_op_contract.py -k "error_budget and triton and bf16"
	env -u TRITON_INTERPRET PYTHONPATH=$(OLDEST) $(BIN)/python -m benchmarks.kernel_report --quick --check

# bf16 and fp32: fp16 takes bf16's path, and the largest cases are run once
sanitize: $(READY)  ## the CUDA kernels on CPU tensors, under AddressSanitizer and UndefinedBehaviorSanitizer
	env $$($(BIN)/python -m tests.emulation.build) $(BIN)/python -m pytest -s tests/test_emulation.py \
	  tests/test_op_contract.py tests/test_large.py $(ARGS) \
	  -k "emulation or cuda and (offsets_beyond or error_budget and (bf16 or fp32 and not dit_s))"

gpu:  ## on a machine with an NVIDIA GPU: tests, ceilings, ops and models within ten minutes; PART="ops model" for some
	began=$$(date +%s); $(PYTHON) setup.py -q build_ext --inplace; built=$$?; \
	PYTHONPATH=$(CURDIR)/engine:$(CURDIR)/kernels $(PYTHON) -m benchmarks.gpu --since $$began \
	  $(PART:%=--part %) $(ARGS) && exit $$built

gpu-dry: $(READY)  ## all of that code on this machine's CPU, tiny, with stand-ins for the GPU
	$(BIN)/python -m benchmarks.gpu --dry-run $(PART:%=--part %) $(ARGS)

native: $(READY)  ## rebuild the C++ kernels in place, only what changed
	$(BIN)/python setup.py -q build_ext --inplace

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "difuse needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,bench,test]'
	touch $@

clean:
	rm -rf build .venv *.egg-info engine/*.egg-info kernels/*.egg-info kernels/difuse_kernels/_native*.so
