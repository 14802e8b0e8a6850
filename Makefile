PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup train test test-slow package docs test-torch bench gpu lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,tensorboard,huggingface,docs,dev]'
	@touch $(STAMP)

train: setup
	$(BIN)/mea train

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The sdist and the wheel are built in dist/, the wheel is tried without extras beside exactly what it requires, and the
# tests run on its files, which are found before those in src. While you work: .venv/bin/python -m pytest tests/attention
test: lint package docs
	PYTHONPATH=$(CURDIR)/build/wheel $(BIN)/python -m pytest -n auto

package: setup
	$(BIN)/python tests/wheel.py

# The site, in site/: open site/index.html; its search needs a server, python3 -m http.server --directory site. Warnings
# are errors; the variable is for a notice about MkDocs' future.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What takes too long to be asked for with every change.
test-slow: setup
	$(BIN)/python -m pytest -n auto -m slow

# The tests with another PyTorch, in an environment of its own: make test-torch VERSION=2.11.0
test-torch: TORCH := .venv-torch-$(VERSION)
test-torch:
	@test -n "$(VERSION)" || { echo "usage: make test-torch VERSION=2.11.0"; exit 2; }
	$(PYTHON) -m venv $(TORCH)
	sed 's/^torch==.*/torch==$(VERSION)/' constraints.txt > $(TORCH)/constraints.txt
	$(TORCH)/bin/pip install --quiet --constraint $(TORCH)/constraints.txt --editable '.[train,tensorboard,huggingface,docs,dev]'
	$(TORCH)/bin/python -m pytest -n auto -m "not gpu"

bench: setup
	$(BIN)/mea bench

# The CUDA tests and the GPU benchmark, by a Python that has PyTorch, from a bare checkout: make gpu PYTHON=python3
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) .venv-torch-* build dist site src/*.egg-info
