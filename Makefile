# Two commands set everything up on a fresh machine that has only Python >= 3.11:
#   make demo    zip the two networks that ship with the package, print the table, write the report
#   make test    run the tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The two onnxruntime wheels exclude each other: gpu only where an NVIDIA driver answers.
RUNTIME := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: demo test lint types dist check-dist clean

demo: $(VENV)/.installed
	$(BIN)/onnxmerge demo --overwrite

# One process for each core, each with one thread: most tests run small products, which threads only slow down.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads what users get: the three source folders are one package only once installed.
types: $(VENV)/.installed
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	cd build/types && $(abspath $(BIN))/python -m mypy --config-file $(abspath pyproject.toml) -p onnxmerge

# The sdist, and the wheel made from it.
dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# As a user gets it: the wheel alone in an environment of its own, run from outside the repository.
check-dist: dist
	rm -rf build/clean
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[$(RUNTIME)]"
	cd / && $(abspath build/clean)/bin/onnxmerge --version
	cd / && $(abspath build/clean)/bin/python -m onnxmerge passes --json > /dev/null
	cd / && demo=$$($(abspath build/clean)/bin/python -c 'import onnxmerge.demo as d; print(d.__path__[0])') && \
		$(abspath build/clean)/bin/onnxmerge inspect --check $$demo/digits.onnx
	rm -rf build/clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(RUNTIME),dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out examples/pipeline/out
