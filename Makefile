# make train, make test: each sets up all it needs in .venv, then runs. Needs Python 3.11+, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RANKS ?= 2

.PHONY: train test lint bench gpu-results clean

train: $(READY)  ## train on CIFAR-10 in CIFAR_ROOT (or ./data) on 2 processes, or on generated images
	$(BIN)/torchrun --nproc_per_node=$(RANKS) --standalone -m distributed.train $(if $(CIFAR_ROOT),--data.root $(CIFAR_ROOT)) $(ARGS)

# Each suite has its budget in seconds, for a slow machine. At its end pytest is interrupted, not killed, so that it ends the
# clusters it began. Tests on real CIFAR read CIFAR_ROOT and are skipped without it.
BUDGET := timeout --signal=INT --kill-after=60
test: $(READY)
	$(BUDGET) 300 $(BIN)/python -m pytest tests/unit
	$(BUDGET) 1200 $(BIN)/python -m pytest tests/multiprocess
	$(BUDGET) 2400 $(BIN)/python -m pytest tests/integration tests/golden

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## speed against the seeds' loop and against compute alone; needs CIFAR_ROOT
	$(BIN)/python -m distributed.bench train --data.root $(CIFAR_ROOT)

# On a GPU that is lent for ten minutes at a time: give the same command until it says that all are finished.
gpu-results: $(READY)  ## the seeds' eight results on one GPU, in slices of 9 minutes; needs CIFAR_ROOT
	$(BIN)/python -m distributed.experiments --data.root $(CIFAR_ROOT) --device cuda --minutes 9 --out results/experiments_gpu

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:  ## everything that make made; runs/ and data/ stay
	rm -rf $(VENV) .venv-* *.egg-info .pytest_cache .mypy_cache .ruff_cache
