# Two commands do everything: `make demo` and `make test`. Each makes the environment first when it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
BUILD := build
MARK := $(VENV)/.installed
# What tests compare with and nothing imports: NVIDIA's TensorRT bindings of two versions, to whose signatures the engine
# code is held, and torchao, to whose arithmetic quantization is. Unpacked beside the packages, never installed.
REFERENCES := $(foreach wheel,tensorrt/10.16.1.11 tensorrt/11.4.0.106 reference/torchao,$(VENV)/$(wheel)/.unpacked)

.PHONY: demo test check lint types env lock clean

demo: $(MARK)
	@$(BIN)/python -m benchmarks.demo --build $(BUILD) --out demo.png

test: $(MARK) $(REFERENCES)
	@$(BIN)/python -m pytest

check: lint types test

lint: $(MARK)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(MARK)
	@$(BIN)/mypy
	@MYPYPATH=typings/tensorrt-10.16 $(BIN)/mypy --cache-dir .mypy_cache/tensorrt-10.16 kit planner runtimes
	@for model in model_repository/*/1/model.py; do $(BIN)/mypy $$model || exit 1; done

env: $(MARK) $(REFERENCES)

# Installed from the lock file, so that two machines get the same versions.
$(MARK): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11: install it or run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/tensorrt/%/.unpacked: $(MARK)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) tensorrt-cu13-bindings==$*
	@touch $@

$(VENV)/reference/torchao/.unpacked: $(MARK)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) torchao==0.18.0
	@touch $@

# Writes the lock anew from pyproject.toml; run it by hand, look at the difference, commit it.
lock:
	rm -rf $(BUILD)/lock && $(PYTHON) -m venv $(BUILD)/lock
	$(BUILD)/lock/bin/python -m pip install --quiet torch==2.13.0 setuptools
	$(BUILD)/lock/bin/python -m pip install --quiet -e ".[cpu-server,train,dev]"
	{ echo "# Made by make lock from pyproject.toml."; \
	  $(BUILD)/lock/bin/python -m pip freeze --all --exclude-editable | grep -v -E "^(pip)==" | sed "s/+cpu$$//"; } > requirements.lock
	rm -rf $(BUILD)/lock

clean:
	rm -rf $(BUILD) deploy demo.png .mypy_cache .pytest_cache .ruff_cache
