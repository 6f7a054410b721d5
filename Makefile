# Needs Python 3.11 and make; .venv is built on first use and again when pyproject.toml or constraints.txt change.
#   make test ARGS="tests/config -k yaml"

PYTHON ?= python3.11
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.ready-docs
.PHONY: test check gpu-check docs format bench demo wheel-test clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

test: $(READY) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(READY) ## style, types, the conventions of docs/design.md
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_conventions.py tests/test_import_graph.py tests/test_docstrings.py

gpu-check: $(READY) ## every kernel of the compiled step through Triton and ptxas for an H100; no GPU is needed
	$(BIN)/python -W ignore -m tests.gpu.check $(ARGS)

docs: $(DOCS_READY) ## the documentation as a site, build/site/index.html; a dead link fails it
	$(BIN)/mkdocs build --strict

format: $(READY) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## speed on this machine
	$(BIN)/nest-fn bench $(ARGS)

demo: $(READY) ## a tiny model trained on synthetic speech
	$(BIN)/nest-fn demo $(ARGS)

wheel-test: $(READY) ## the wheel, installed apart and imported beside a hostile layers.py
	$(BIN)/python -m pytest -q tests/test_packaging.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
