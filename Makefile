# make demo: environment, install, train on The Time Machine, print generated text.   make test: the test suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py requirements-dev.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/cpu/lm/*.h csrc/cpu/lm/*.cpp csrc/cuda/*.cu* csrc/cuda/*/*.cu)

.PHONY: demo test lint format gpu clean

demo: $(VENV)/installed
	$(BIN)/rnnfast train --out runs/demo --overwrite
	$(BIN)/rnnfast generate runs/demo --prefix "time traveller" --num-chars 200

# In two processes, each of which begins at one end of the files; whichever is done first takes from the other's rest.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Uses the machine's own Python and torch, without network: tests, sanitizers, calibration and benchmarks on a GPU.
gpu:
	$(PYTHON) -m benchmarks.gpu

# Without build isolation the compiled scan is built against the torch that it will run with.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rnnfast/*.so
