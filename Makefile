# make train, make test: each sets up all it needs in .venv, then runs. Needs Python 3.11+, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

.PHONY: train test lint bench gpu-check gpu-check-dry gpu-pack gpu-collect gpu-results clean

train: $(READY)  ## train on CIFAR-10 in CIFAR_ROOT (or ./data), or on generated images, on 2 processes or one per GPU
	$(BIN)/torchrun --nproc_per_node=$(RANKS) --standalone -m distributed.train $(if $(CIFAR_ROOT),--data.root $(CIFAR_ROOT)) $(ARGS)

# Each suite has its budget in seconds, for a slow machine. At its end pytest is interrupted, not killed, so that it ends the
# clusters it began. Tests on real CIFAR read CIFAR_ROOT and are skipped without it.
BUDGET := timeout --signal=INT --kill-after=60
test: $(READY)
	$(BUDGET) 480 $(BIN)/python -m pytest tests/unit
	$(BUDGET) 1800 $(BIN)/python -m pytest tests/multiprocess
	$(BUDGET) 3300 $(BIN)/python -m pytest tests/integration tests/golden

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## speed against the seeds' loop and against compute alone; needs CIFAR_ROOT
	$(BIN)/python -m distributed.bench train --data.root $(CIFAR_ROOT)

# Your own GPU: make gpu-check, then make gpu-results. A GPU rented by the minute, offline: make gpu-check-dry and make gpu-pack
# here, the two printed commands there, then make gpu-collect on the returned files.
GPU_CHECK := runs/gpu_check
gpu-check: $(READY)  ## check correctness and speed on this GPU in under 5 minutes
	$(BIN)/python -m distributed.gpu_check --out $(GPU_CHECK)

gpu-results: $(READY)  ## the seeds' eight results on one GPU that passed the check (or UNCHECKED=1); needs CIFAR_ROOT
	$(if $(UNCHECKED),,$(BIN)/python -m distributed.gpu_pack passed $(GPU_CHECK)/gpu_check.jsonl)
	$(BIN)/python -m distributed.experiments --data.root $(CIFAR_ROOT) --device cuda --out results/experiments_gpu

gpu-check-dry: $(READY)  ## run gpu-pack's commands on this CPU, offline, with few packages; ARGS="--python OTHER"
	$(BUDGET) 240 $(BIN)/python -m distributed.gpu_pack dry-run $(ARGS)

gpu-pack: $(READY)  ## wheels and CIFAR-10 for a rented GPU, and the commands to run there; needs CIFAR_ROOT
	$(BIN)/python -m distributed.gpu_pack pack $(if $(CIFAR_ROOT),--data.root $(CIFAR_ROOT))

gpu-collect: $(READY)  ## merge the files returned in FROM=FOLDER into results/
	$(BIN)/python -m distributed.gpu_pack collect $(FROM)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:  ## everything that make made; runs/ and data/ stay
	rm -rf $(VENV) .venv-* .whl .cifar-a .cifar-b *.egg-info .pytest_cache .mypy_cache .ruff_cache
