# Everything happens in $(VENV), with the versions of constraints.txt. pip reads its usual settings.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: run test slow slow-others slow-triton slow-oracle triton programs sanitize bench aot docs lint types dist clean

run: $(VENV)/run
	$(BIN)/attndsl run examples/longformer.attn --length 4096 --heads 12 --text examples/data/us-constitution.txt

test: $(VENV)/test
	$(BIN)/pytest --ignore tests/oracle -m "not slow and not whole"

# three that may run side by side
slow: slow-others slow-triton slow-oracle

GPU = tests/test_triton.py tests/test_gpu_script.py

slow-others: $(VENV)/oracle
	$(BIN)/pytest -m "slow and not oracle and not whole" $(GPU:%=--ignore %)

slow-triton: $(VENV)/oracle
	$(BIN)/pytest $(GPU) -m "slow and not whole"

slow-oracle: $(VENV)/oracle
	$(BIN)/pytest -m oracle

triton: $(VENV)/oracle
	$(BIN)/pytest tests/test_triton.py -m whole

programs: $(VENV)/test
	$(BIN)/pytest tests/test_cpu_programs.py -k random --programs 300

sanitize: $(VENV)/test
	$(BIN)/pytest tests/test_cpu.py -k memory_and_arithmetic --sanitized 1

bench: $(VENV)/run
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

aot: $(VENV)/oracle
	$(BIN)/python -m attndsl.plugins.triton.ahead

docs: $(VENV)/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --conf-dir docs . build/site

lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/test
	$(BIN)/mypy

dist: $(VENV)/test
	$(BIN)/pip install --quiet --constraint constraints.txt build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist docs/gallery *.egg-info

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) .
	touch $@

$(VENV)/test: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) '.[test]'
	touch $@

$(VENV)/oracle: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) '.[test,oracle,docs]'
	touch $@

$(VENV)/docs: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) '.[docs]'
	touch $@
