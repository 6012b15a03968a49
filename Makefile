# `make demo` makes a picture, `make test` runs the tests, with a part of the tables of layouts and families in which all
# of their pairs meet; `make matrix` runs the whole of them and writes the support matrix (docs/MATRIX.md); `make check`
# checks format, lint and types; `make soak` runs hundreds of prompts by the same ranks; `make fuzz` sends a million
# malformed frames, and goes on with a run that was ended.
# Each sets up what it needs in .venv; nothing is installed anywhere else.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# A machine without an NVIDIA driver gets the CPU build by its exact name, so that no index can answer with CUDA's.
TORCH ?= $(shell command -v nvidia-smi >/dev/null && echo torch==2.13.0 || echo torch==2.13.0+cpu)

# Two processes of tests, each with ranks of its own, and behind them, by themselves, the tests that hold to seconds: of
# these, too, two at a time, since they mostly wait.
TEST_PROCESSES ?= 2

.PHONY: demo test matrix check format bench chaos soak fuzz clean

demo: $(VENV)/ready
	$(BIN)/python cli run workflows/api/demo_txt2img.api.json

test: $(VENV)/ready
	$(BIN)/python -m pytest --ignore=tests/alone -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest tests/alone

matrix: $(VENV)/ready
	PARALLELDIT_WHOLE_MATRIX=1 PARALLELDIT_WRITE_MATRIX=1 $(BIN)/python -m pytest tests/ranks tests/unit/test_compiled_blocks.py

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/ready
	$(BIN)/python tools/bench.py

chaos: $(VENV)/ready
	$(BIN)/python tools/chaos $(CHAOS)

soak: $(VENV)/ready
	$(BIN)/python tools/chaos soak $(SOAK)

fuzz: $(VENV)/ready
	$(BIN)/python tools/fuzz_frames.py --frames 1000000 --state $(VENV)/fuzz.json

clean:
	rm -rf $(VENV)

$(VENV)/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" || { \
	  echo "No $(TORCH) in pip's package index. Point pip at PyTorch's wheels for this machine (PIP_EXTRA_INDEX_URL;" \
	       "the address stands on PyTorch's installation page), or choose another build: make TORCH=torch==2.13.0" >&2; \
	  exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	touch $@
