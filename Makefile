# make setup    .venv with SimpleTuner, this package and the development tools
# make demo     the whole session on a tiny real pipeline: probe, heatmap, weighted config, follow-up training
# make test     lint, types and all tests
# make lint     ruff and mypy
# make clean    removes everything that the above have made
#
# A Python 3.12 to 3.14 is found by itself; make PYTHON=/path/to/python names one.

SHELL = /bin/sh
BIN = .venv/bin
STAMP = .venv/layerprobe-setup
export PYTHON

.PHONY: setup demo test lint clean

setup: $(STAMP)

$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt simpletuner_layerprobe.pth
	@sh tools/setup.sh
	@touch $@

demo: $(STAMP)
	@rm -rf demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

clean:
	rm -rf .venv demo build dist simpletuner_layerprobe.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache debug.log
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
