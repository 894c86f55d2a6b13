# make demo    robust and plain reward models on real preferences, one table and one plot
# make test    the test suite
# make test-all  every case of every test in every mode: interpreted, emulated, on poisoned memory
# make test-sanitizers  the C++ core and CPU kernels under ASan, UBSan and valgrind; not part of CI
# make test-gpu  the tests of the ops on a GPU, and every kernel once under compute-sanitizer
# make test-kill  100 times kill -9 in the middle of training, and what --resume makes of it (minutes)
# make test-cuda-build  the whole extension built and linked against a CUDA torch; no GPU needed
# make bench-gpu  every op and whole DPO steps of a 1B model, on a GPU, beside the peers installed
# make lint    every checker;  make format  what they can mend themselves
# make bench   every op beside its peers, result and plots in benchmarks/results; BENCH="--op NAME"
# make bench-micro  one op a line while it is worked on, by pytest-benchmark; CI runs each call once
# Each sets up .venv first. TORCH and PYTHON choose what it is made from.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
QUICK ?=
BENCH ?=
GPU ?=
PEERS ?= liger-kernel==0.8.5 cut-cross-entropy==25.1.1 sqwash==0.1.0 dro==0.4.3
BIN := $(VENV)/bin
# Every Triton kernel, interpreted on the CPU, and every CUDA kernel, built for the host: the tests of
# the ops twice more; and once more where fresh memory is NaN, as it is in those two.
TESTS_OF_OPS := $(patsubst %,tests/ops/test_%.py,backends_equal_reference robust_risk row_worst_case \
  preference_loss reward_loss token_logprobs linear_token_logprobs sequence_logprobs linear_preference_loss \
  sequence_preference_loss policy_loss kernels many_pairs zero_sizes transforms wrong_values \
  every_kernel determinism)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h $(addprefix csrc/*/*.,cpp h inc cu) tests/emulated/*.h)
# Tests that share what takes long to make go to one worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup
EMULATED := build/emulated/ops_cuda.so

.PHONY: demo test test-all test-sanitizers test-kill test-cuda-build test-gpu bench-gpu lint format bench bench-micro clean
.DELETE_ON_ERROR:

# torch comes first and alone, so that nothing else decides which build of it is installed.
# The package without its extension, which what compiles that waits for; pip keeps one core busy.
$(VENV)/.package: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q "setuptools>=77" wheel ninja
	DRRLHF_BUILD=none $(BIN)/pip install -q --no-build-isolation -e .
	touch $@

$(VENV)/.built: $(VENV)/.package $(CXX_FILES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# .venv/.trl, .venv/.test, .venv/.dev: what the extra of that name needs. The package is there by
# now, so nothing is built again.
$(VENV)/.%: $(VENV)/.package
	$(BIN)/pip install -q "drrlhf[$*]"
	touch $@

demo: $(VENV)/.built $(VENV)/.trl
	$(BIN)/drrlhf train reward --demo $(if $(QUICK),--quick) --output-dir demo

# The usual run, beside which the CUDA kernels are built for the host; then the modes of the ops,
# fewer tests each (tests/conftest.py).
test: $(VENV)/.built $(VENV)/.test
	nice $(BIN)/python tests/emulated/build.py $(EMULATED) & built=$$!; \
	  $(PYTEST) --benchmark-disable tests benchmarks; ended=$$?; wait $$built && exit $$ended
	DRRLHF_FILL=1 $(PYTEST) -k "cpp or reference" $(TESTS_OF_OPS)
	DRRLHF_FILL=1 TRITON_INTERPRET=1 $(PYTEST) $(TESTS_OF_OPS)
	DRRLHF_FILL=1 DRRLHF_EMULATED=$(abspath $(EMULATED)) $(PYTEST) $(TESTS_OF_OPS)

# Every case, and every test of the ops in every mode.
test-all: export DRRLHF_ALL = 1
test-all: test

test-sanitizers: $(VENV)/.built $(VENV)/.test
	$(BIN)/python tests/sanitizers/run.py $(TESTS_OF_OPS)

test-kill: $(VENV)/.built $(VENV)/.test
	$(BIN)/python tests/support/kill.py --kills 100

test-cuda-build: $(VENV)/.test
	$(BIN)/python -m pytest -m cuda_build tests/ops/test_cuda.py

# In an environment that has a CUDA torch: the kernels are built into the checkout, nothing is
# installed. Five minutes on 16 cores; whatever ends it, build/gpu/ has what was done.
test-gpu:
	$(PYTHON) tests/gpu.py $(TESTS_OF_OPS) tests/trl/test_row_attention.py $(GPU)

# The same environment again: whole steps, every op and the ceilings beside what is installed. The
# most valuable first, in five minutes with what starts and compiles; BENCH="--seconds 3600" for all.
bench-gpu:
	$(PYTHON) -m drrlhf bench --suite gpu --seconds 240 --output benchmarks/results $(BENCH)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Libraries that are measured beside ours; what they need at run time is there already, and what
# they ask for besides (triton, torchvision, xgboost ...) is not needed for it.
$(VENV)/.peers: $(VENV)/.bench
	$(BIN)/pip install -q --no-deps $(PEERS)
	touch $@

bench: $(VENV)/.built $(VENV)/.peers
	$(BIN)/drrlhf bench --output benchmarks/results --plot $(BENCH)

bench-micro: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH)

clean:
	rm -rf $(VENV) build drrlhf/*.so drrlhf/_build.json
