PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo verify-demo test coverage check format

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0 numpy
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	mkdir -p out && rm -f out/demo.db out/demo.db-*
	$(BIN)/grainwise search --model examples.demo:model --data examples.demo:data --size 0.125 --accuracy-drop 0.005 \
		--budget 150 --study demo --store sqlite:///out/demo.db --out out/demo --threads 1

verify-demo: $(READY)
	$(BIN)/grainwise verify out/demo --model examples.demo:model --data examples.demo:data --json

check: $(READY)
	$(BIN)/ruff check src tests examples bench
	$(BIN)/ruff format --check src tests examples bench
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest -n 2 --dist worksteal

coverage: $(READY)  # tracing makes the suite half as long again
	$(BIN)/pytest -n 2 --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

format: $(READY)
	$(BIN)/ruff format src tests examples bench
	$(BIN)/ruff check --fix src tests examples bench
