# Two commands need nothing but Python 3.11 or newer: `make quickstart` and `make test`.
# `make test` is the fast tier; `make test-all` runs every test, as .ci/run does.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all test-peer lint types clean

# The environment: made anew when the package's requirements change.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.core

# Packages that tests compare with, in a folder that nothing else imports from: beside torchvision, which both of them
# depend on, transformers does not load on a CPU build of torch.
$(VENV)/.oracles: tests/parity/oracles.txt $(VENV)/.dev
	rm -rf $(VENV)/oracles
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/oracles -r tests/parity/oracles.txt
	touch $@

# transformers' own test suites, from its source distribution of the pinned version, and what only they need.
$(VENV)/.peer: tests/peer/peer.txt constraints.txt $(VENV)/.dev
	rm -rf $(VENV)/peer
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/peer -r tests/peer/peer.txt
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest $(VENV)/peer -c constraints.txt transformers
	tar -xzf $(VENV)/peer/transformers-*.tar.gz -C $(VENV)/peer
	touch $@

OUTPUT ?= quickstart
quickstart: $(VENV)/.core
	$(BIN)/unclipped quickstart --output $(OUTPUT)

# As many processes as the machine has cores, at most 8; a file's tests stay in one, since they share what they prepare.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile
test: $(VENV)/.oracles
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.oracles $(VENV)/.peer
	$(PYTEST)

# The suites of transformers on all five model classes; `make test-all` takes two of them.
test-peer: $(VENV)/.peer
	UNCLIPPED_PEER_ALL=1 $(PYTEST) tests/peer

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
