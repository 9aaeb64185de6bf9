# Two commands for a fresh machine with Python and make: `make demo` and `make test`. Each does its own set-up.

PYTHON ?= python3
VENV ?= .venv
VENV_PEERS ?= .venv-peers
BACKEND ?= jax
ARGS ?=
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
RUN = TF_CPP_MIN_LOG_LEVEL=3 $(VENV)/bin/python

.PHONY: demo test lint benchmark peers clean

# Trains FAM and BSWA on PassKey and streams long texts. BACKEND=torch or tensorflow for another backend.
demo: $(VENV)/.$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(RUN) examples/passkey.py --backend $(BACKEND) $(ARGS)

# Lint, then every test once per backend, in one pytest command.
# JAX compiles thousands of tiny programs here: without LLVM's optimisation that takes half the time.
test: lint
	OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3 XLA_FLAGS=--xla_backend_optimization_level=0 \
	$(VENV)/bin/python -m pytest -q --durations=10 --dist=each \
	--tx 'popen//env:KERAS_BACKEND=jax//id=jax' \
	--tx 'popen//env:KERAS_BACKEND=torch//id=torch' \
	--tx 'popen//env:KERAS_BACKEND=tensorflow//id=tensorflow' $(ARGS)

lint: $(VENV)/.all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Time ratios against hand-written JAX and torch, on this machine.
benchmark: $(VENV)/.all
	$(RUN) examples/benchmarks/speed.py $(ARGS)

# Prefill and decoding against other packages, which have a virtual environment of their own.
peers: $(VENV_PEERS)/.peers
	TF_CPP_MIN_LOG_LEVEL=3 $(VENV_PEERS)/bin/python examples/benchmarks/peers.py $(ARGS)

$(VENV_PEERS)/.peers: pyproject.toml
	$(PYTHON) -m venv $(VENV_PEERS)
	$(VENV_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[jax,torch,peers]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.jax $(VENV)/.torch $(VENV)/.tensorflow: $(VENV)/.%: $(VENV)/bin/python pyproject.toml
	$(PIP) -e '.[$*,plot]'
	touch $@

$(VENV)/.all: $(VENV)/bin/python pyproject.toml
	$(PIP) -e '.[jax,tensorflow,torch,hub,serving,sessions,formats,plot,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV_PEERS) out .pytest_cache .ruff_cache .hypothesis
