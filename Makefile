# `make demo` and `make test` do all the set-up: a virtual environment, then the package with everything they need.
# An environment takes about 6 GB; `make demo VENV=/some/where/venv` puts it elsewhere, or uses one that is there.
PYTHON ?= python3
VENV ?= .venv
RUN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.com_lightning-$(shell cksum pyproject.toml | cut -d' ' -f1)

SUITES := images8 images8-resnet texts6 lm4 lora6

.PHONY: demo test test-unit test-all test-oldest lint docs bench bench-suites clean

demo: $(INSTALLED)
	PATH="$(RUN):$$PATH" bash examples/digits/demo.sh

# Unit and integration tests, and the examples in docstrings.
test: lint docs
	$(RUN)/python -m pytest -n 2 -m "not slow"

# Under a minute on one core.
test-unit: $(INSTALLED)
	$(RUN)/python -m pytest tests/unit

# Also tests/slow.
test-all: lint
	$(RUN)/python -m pytest -n 2

# The oldest versions that are supported, with Python 3.11, in an environment of their own.
test-oldest:
	test -x $(VENV)-oldest/bin/python || python3.11 -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --editable ".[dev]" --constraint tests/oldest.txt
	$(VENV)-oldest/bin/python -m pytest -n 2 -m "not slow"

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports --no-logo --no-cache
	$(RUN)/mypy

# Into build/site, to be opened from disk. The variable silences an advertisement that is printed at every start.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet

bench: $(INSTALLED)
	$(RUN)/python -m benchmarks.lockstep
	$(RUN)/python -m benchmarks.speed
	OMP_NUM_THREADS=1 $(RUN)/python -m benchmarks.digits
	$(RUN)/python -m benchmarks.cost

# `make -j2 bench-suites ARGS="--seeds 0 --methods ablation adapters --oracle"` measures the main rows of one seed, two
# suites at a time, each on one core. Many hours without arguments: training, then every rule, also with settings chosen on val. `make bench-lm4` runs one suite, and
# `make bench-lm4 ARGS="--seeds 0 --methods chain"` some of it. What is trained, and what is measured already, is kept.
bench-suites: $(SUITES:%=bench-%)

bench-%: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN)/python -m benchmarks.suites $* $(ARGS)

$(INSTALLED): pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): some minutes, about 6 GB"
	$(RUN)/python -m pip install --quiet --editable ".[dev]"
	rm -f $(VENV)/.com_lightning-*
	touch $@

clean:
	rm -rf .venv outputs build dist *.egg-info
