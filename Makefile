# make train, make test: each first installs what it needs in .venv. Requires Python 3.11+ and make; the tests also a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMMA := ,
# The visible GPUs: nvidia-smi ignores the variable, and also lists MIG slices.
GPUS := $(strip $(if $(filter undefined,$(origin CUDA_VISIBLE_DEVICES)),$(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU),\
	$(words $(filter-out -%,$(subst $(COMMA), ,$(CUDA_VISIBLE_DEVICES))))))
RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
unexport PYTHONDONTWRITEBYTECODE  # hundreds of processes would recompile our modules

INTEGRATION := $(wildcard tests/integration/test_*.py)
ABUSE := $(filter tests/integration/test_abuse_%,$(INTEGRATION))
CLUSTERS := $(patsubst %,tests/integration/test_%.py,ray examples slurm slurm_doctor slurm_submit hosts)
RECOVERY := $(patsubst %,tests/integration/test_%.py,engines kills restarts superseded)
CORE := $(patsubst %,core-%,multiprocess unit integration)
# Longest first, so that the last ones finish at about the same time.
SUITES := test-multiprocess test-integration test-clusters test-recovery test-unit test-abuse
# Suites run three at a time (JOBS=1: one), since each mostly waits. Each has a budget in seconds, scaled to this machine's
# speed; when it is used up, pytest is interrupted, not killed, so that it shuts down the clusters it started.
TOGETHER = $(MAKE) --no-print-directory --keep-going --jobs=$(or $(JOBS),3) --output-sync=target
SLOWNESS = $$($(PYTHON) tests/kit/speed.py)
BUDGET = timeout --foreground --signal=INT --kill-after=60 $$(awk "BEGIN { print int($(1) * $(SLOWNESS)) }")
TIMES := .test-times
timed = @begin=$$(date +%s); $(1); code=$$?; \
	echo "$@: $$(($$(date +%s) - begin)) s, exit code $$code" | tee -a $(TIMES); exit $$code
pytest = $(call timed,$(call BUDGET,$(1)) $(BIN)/python -m pytest -p no:cacheprovider --skips=$(TIMES) $(2))
# Run targets in parallel, then one alone, then list the time that each took, and why tests were skipped.
summarized = @rm -f $(TIMES); begin=$$(date +%s); $(TOGETHER) $(1); code=$$?; $(if $(2),$(TOGETHER) $(2) || code=$$?;) \
	echo "$@: $$(($$(date +%s) - begin)) s, of which, $(or $(JOBS),3) at a time:"; sort -u $(TIMES); exit $$code
OLDEST := .venv-torch211

.PHONY: train test test-all $(CORE) $(SUITES) test-oldest dry-oldest dry-newest lint \
	gpu-check gpu-check-dry gpu-results clean

train: $(READY)  ## train on CIFAR-10 in CIFAR_ROOT (or ./data), or on generated images, on 2 processes or one per GPU
	$(BIN)/torchrun --nproc_per_node=$(RANKS) --standalone -m distributed.train $(if $(CIFAR_ROOT),--data.root "$(CIFAR_ROOT)") $(ARGS)

# Tests on real CIFAR read CIFAR_ROOT and are skipped without it.
test: $(READY)  ## unit tests, tests on two ranks, core integration tests, bit-identical resume after kills
	@echo "make test: under 10 minutes on two cores. make test-all adds everything else and takes 35 to 65."
	$(call summarized,$(CORE))

test-all: $(READY)  ## every test, a real Ray and Slurm, hostile inputs, lint, types and the oldest torch
	@echo "make test-all: 35 to 65 minutes on two cores"
	$(call summarized,$(SUITES) test-oldest dry-newest lint,dry-oldest)

core-unit: $(READY)
	$(call pytest,600,tests/unit)

core-multiprocess: $(READY)
	$(call pytest,600,tests/multiprocess --max-ranks=2 -m 'not slow')

core-integration: $(READY)
	$(call pytest,600,tests/golden $(patsubst %,tests/integration/test_%.py,command_line kills superseded))

test-unit: $(READY)
	$(call pytest,1200,tests/unit)

test-multiprocess: $(READY)
	$(call pytest,2700,tests/multiprocess)

test-integration: $(READY)
	$(call pytest,2700,tests/golden $(filter-out $(ABUSE) $(CLUSTERS) $(RECOVERY),$(INTEGRATION)))

test-recovery: $(READY)  ## kills, restarts, other numbers of processes
	$(call pytest,1800,$(RECOVERY))

test-abuse: $(READY)
	$(call pytest,1200,$(ABUSE))

test-clusters: $(READY)  ## a real Ray, a real Slurm and several hosts, one after the other
	$(call pytest,2700,$(CLUSTERS))

# The oldest torch that pyproject.toml allows: imports, a step, a finished run and its evaluation.
test-oldest: $(OLDEST)/.ready
	$(call timed,$(call BUDGET,400) $(OLDEST)/bin/python -m pytest -m smoke tests/integration/test_command_line.py tests/unit/test_autograd_pass.py tests/unit/test_torch_internals.py)

# The steps of the GPU check on a CPU. They have time limits, so nothing else runs meanwhile.
dry-oldest: $(OLDEST)/.ready
	$(call timed,$(call BUDGET,400) $(OLDEST)/bin/python -m distributed.gpu_check --device cpu --tiny --out $(GPU_CHECK)_oldest)

# Those that no other test runs, with the newest torch.
dry-newest: $(READY)
	$(call timed,$(call BUDGET,400) $(BIN)/python -m distributed.gpu_check --device cpu --tiny --only units networks invariance \
		--out $(GPU_CHECK)_newest)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

GPU_CHECK := runs/gpu_check
gpu-check: $(READY)  ## check correctness and speed on this GPU in about 5 minutes
	$(BIN)/python -m distributed.gpu_check --out $(GPU_CHECK)

gpu-results: $(READY)  ## the references' eight results on one GPU; needs CIFAR_ROOT
	$(BIN)/python -m distributed.experiments --data.root "$(CIFAR_ROOT)" --device cuda --only reference

gpu-check-dry: $(READY)  ## the same steps on this CPU, with small shapes
	$(BIN)/python -m distributed.gpu_check --device cpu --tiny --out $(GPU_CHECK)_dry

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'  # compiling all files would take a minute
	touch $@

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --no-compile torch==2.11.0 torchvision==0.26.0 \
		numpy pydantic tomli-w loguru tqdm safetensors filelock greenlet tensorboard matplotlib pytest pytest-timeout
	$(OLDEST)/bin/pip install --quiet --no-deps --editable .
	touch $@

clean:  ## remove everything that make created; runs/ and data/ stay
	rm -rf $(TIMES) $(VENV) .venv-* *.egg-info .pytest_cache .mypy_cache .ruff_cache
