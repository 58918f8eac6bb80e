# `make demo` and `make test` do everything; each makes the environment first when it is missing. `make quick` is the
# developer's loop, `make check` what runs on every change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
BUILD := build
MARK := $(VENV)/.installed
PIP := -m pip --disable-pip-version-check
# What tests compare with and nothing imports: NVIDIA's TensorRT bindings of two versions, to whose signatures the engine
# code is held, and torchao, to whose arithmetic quantization is. Unpacked beside the packages, never installed.
REFERENCES := $(foreach wheel,tensorrt/10.16.1.11 tensorrt/11.4.0.106 reference/torchao,$(VENV)/$(wheel)/.unpacked)
# ONNX Runtime for GPUs, to whose options its providers are held; where the package index does not have it, tests skip.
ORT_GPU := $(VENV)/reference/onnxruntime-gpu
# The compiler that builds plans without a GPU, for the tests that meet it; where the package index does not have it they
# skip. It is NVIDIA's, under NVIDIA's licence.
RTX := $(VENV)/tensorrt/rtx-1.7.1.116

ROOMS := kit planner runtimes pipeline export quantize serve benchmarks
ROOM ?= all
ifeq ($(filter $(ROOM),all $(ROOMS)),)
$(error no room $(ROOM); there are: $(ROOMS))
endif
QUICK_CODE := $(if $(filter all,$(ROOM)),,$(ROOM) tests/$(ROOM))
QUICK_TESTS := $(if $(filter all,$(ROOM)),tests,tests/$(ROOM) tests/test_architecture.py)

.PHONY: demo test quick check compile lint types env pythons container-python lock clean

demo: $(MARK)
	@$(BIN)/python -m benchmarks.demo --build $(BUILD) --out demo.png

test: $(MARK) $(REFERENCES) $(RTX)/.unpacked $(ORT_GPU)/.unpacked
	@$(BIN)/python -m pytest -n 2 --dist loadfile

# Without servers, GPUs and heavy exports (tests/quick.py); of one room: make quick ROOM=planner
quick: $(MARK)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy $(QUICK_CODE)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -p tests.quick $(QUICK_TESTS)

check: lint types test

# Compile everything that can be exported for every compute capability, at tiny sizes; most of an hour on two cores.
compile: $(MARK) $(RTX)/.unpacked
	@COMPILE=all $(BIN)/python -m pytest tests/runtimes/test_trt_compile_all.py

lint: $(MARK)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(MARK)
	@$(BIN)/mypy
	@MYPYPATH=typings/tensorrt-10.16 $(BIN)/mypy --cache-dir .mypy_cache/tensorrt-10.16 kit planner runtimes
	@for model in model_repository/*/1/model.py; do $(BIN)/mypy $$model || exit 1; done

env: $(MARK) $(REFERENCES) $(RTX)/.unpacked $(ORT_GPU)/.unpacked

# Installed from the lock file, so that two machines get the same versions.
$(MARK): requirements.lock pyproject.toml $(wildcard export/optimum_plugin/*.* export/optimum_plugin/register/*.py)
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11: install it or run make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing $$(grep -c == requirements.lock) packages into $(VENV), 2 GB (more with torch's CUDA build); minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) install -r requirements.lock
	$(BIN)/python $(PIP) install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python $(PIP) install --quiet --no-deps --no-build-isolation --force-reinstall ./export/optimum_plugin
	@rm -rf export/optimum_plugin/build export/optimum_plugin/*.egg-info
	@touch $@

$(RTX)/.unpacked: $(MARK)
	@$(BIN)/python $(PIP) install --quiet --no-deps --upgrade --target $(@D) \
	  tensorrt-rtx-cu13-bindings==1.7.1.116 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 \
	  && touch $@ || echo "TensorRT for RTX could not be fetched: the tests that compile with it are skipped"

$(ORT_GPU)/.unpacked: $(MARK)
	@$(BIN)/python $(PIP) install --quiet --no-deps --upgrade --target $(@D) onnxruntime-gpu==1.31.1 \
	  && touch $@ || echo "onnxruntime-gpu could not be fetched: the tests of its options are skipped"

$(VENV)/tensorrt/%/.unpacked: $(MARK)
	@$(BIN)/python $(PIP) install --quiet --no-deps --upgrade --target $(@D) tensorrt-cu13-bindings==$*
	@touch $@

$(VENV)/reference/torchao/.unpacked: $(MARK)
	@$(BIN)/python $(PIP) install --quiet --no-deps --upgrade --target $(@D) torchao==0.18.0
	@touch $@

# What needs no torch, on the newer Pythons with numpy 2: planning, doctor, the client, prompts.
OTHERS ?= python3.12 python3.13
WITHOUT_TORCH := tests/test_without_torch.py tests/pipeline/test_request.py tests/serve/test_triton_config.py \
    tests/kit/test_cli.py tests/kit/test_gpus.py $(addprefix tests/planner/test_,$(addsuffix .py,command feasible \
    measurements plan prices queueing)) tests/benchmarks/test_speed.py

pythons:
	@for python in $(OTHERS); do \
	  if ! command -v $$python >/dev/null || ! $$python -c ""; then echo "skipped $$python: not installed"; continue; fi; \
	  env=$(BUILD)/pythons/$$(basename $$python); \
	  $$python -m venv $$env && $$env/bin/python $(PIP) install --quiet -e ".[client,chart]" "numpy>=2" "transformers>=5.23" \
	    "jinja2>=3.1" pytest pytest-timeout || exit 1; \
	  $$env/bin/python -c "import sys; from importlib.metadata import version; print('Python', sys.version.split()[0], \
	    *(f'{name} {version(name)}' for name in ('numpy', 'transformers', 'tritonclient')))" && \
	  $$env/bin/python -W error -m kit plan --variant klein-4b --gpu l4 >/dev/null && \
	  $$env/bin/python -W error -m kit doctor >/dev/null && \
	  $$env/bin/python -m pytest -p no:cacheprovider -k "not is_fast" $(WITHOUT_TORCH) || exit 1; \
	done

# The code that serves, on the Python and the numpy of NVIDIA's container, without a server; 6 GB and some minutes. One test
# is left out: it is about the server of the package index, which is not installed there.
CONTAINER_PYTHON ?= python3.12

container-python:
	$(CONTAINER_PYTHON) -m venv $(BUILD)/pythons/container
	$(BUILD)/pythons/container/bin/python $(PIP) install --quiet -e ".[export,serve,quality,train]" "numpy>=2" \
	  "hypothesis>=6.170" pytest pytest-timeout
	$(BUILD)/pythons/container/bin/python -m pytest -p no:cacheprovider -m "not server and not gpu" tests/pipeline tests/serve \
	  --deselect tests/serve/test_launch.py::test_numpy_2_is_rejected_for_the_packaged_server

# Rewrites the lock from pyproject.toml; run it by hand, look at the difference, commit it.
lock:
	rm -rf $(BUILD)/lock && $(PYTHON) -m venv $(BUILD)/lock
	$(BUILD)/lock/bin/python $(PIP) install torch==2.13.0 setuptools
	$(BUILD)/lock/bin/python $(PIP) install -e ".[all,dev]" ./export/optimum_plugin
	{ echo "# Made by make lock from pyproject.toml."; \
	  $(BUILD)/lock/bin/python -m pip freeze --all --exclude-editable --exclude optimum-flux2 | grep -v -E "^(pip)==" | \
	  sed "s/+cpu$$//"; } > requirements.lock
	rm -rf $(BUILD)/lock

clean:
	rm -rf $(BUILD) deploy demo.png .mypy_cache .pytest_cache .ruff_cache export/optimum_plugin/build
