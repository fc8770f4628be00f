# make setup    .venv with SimpleTuner, this package and the development tools
# make demo     the whole session on a small trained pipeline: probe, report, LoKr config, training, pictures; five to seven minutes
# make check    lint, types and the fast tests, without torch: about a minute
# make test     lint, types and all tests
# make test-oldest   the tests against the real Trainer, on the oldest SimpleTuner supported, in .venv-oldest
# make families      docs/families.md, from the family tests' own results
# make statistics    the large simulations behind docs/confidence.md
# make bench    every benchmark but the GPU's, and docs/costs.md and docs/bases.md from the results
# make faults   1,000 kills of the writer and every other fault, for real; writes docs/reliability.md (mounting needs root)
# make fuzz     210,000 inputs over every reader; writes docs/reliability.md
# make lint     ruff and mypy
# make clean    removes everything that the above have made
#
# A Python 3.12 to 3.14 is found by itself; make PYTHON=/path/to/python names one.

SHELL = /bin/sh
BIN = .venv/bin
STAMP = .venv/layerprobe-setup
OLDEST = 4.8.0
# A file to one of two workers, in the order of testpaths: what its tests share is made once, the long files are first.
WORKERS = -n 2 --dist loadfile --no-loadscope-reorder
export PYTHON

.PHONY: setup demo check test test-oldest families statistics bench faults fuzz lint clean

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

check: lint
	$(BIN)/pytest $(WORKERS) tests/unit --ignore tests/unit/test_cli_imports.py

test: lint
	$(BIN)/pytest $(WORKERS)

test-oldest:
	@sed 's/^simpletuner==.*/simpletuner==$(OLDEST)/' constraints.txt > .venv-oldest.txt
	@VENV=.venv-oldest CONSTRAINTS=.venv-oldest.txt sh tools/setup.sh
	.venv-oldest/bin/pytest tests/unit/test_seams.py tests/simpletuner/test_real_sd3.py tests/simpletuner/test_real_flux.py \
		tests/simpletuner/test_real_run.py

families: $(STAMP)
	$(BIN)/python tools/families_table.py

statistics: $(STAMP)
	$(BIN)/python tests/statistics/study.py

bench: export SIMPLETUNER_LAYERPROBE = 0
bench: $(STAMP)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/analysis.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/tables.py

faults: export LAYERPROBE_RECORD_FAULTS = 1
faults: export LAYERPROBE_KILLS = 1000
faults: $(STAMP)
	$(BIN)/pytest tests/robustness tests/simpletuner/test_real_faults.py
	$(BIN)/python tools/reliability.py

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/run.py --inputs 210000 --save tests/fuzz/results.json
	$(BIN)/python tools/reliability.py

clean:
	rm -rf .venv .venv-oldest .venv-oldest.txt demo artefacts build dist simpletuner_layerprobe.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache debug.log
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
