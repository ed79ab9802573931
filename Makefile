# `make demo` and `make test` are all a new user types; both set up .venv first when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all test-slurm test-hosts bench-planner lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

# uv does not read PIP_FIND_LINKS, so it is handed on under uv's own name; an empty value is fine.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"error: llmtrain needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; run make PYTHON=python3.11 ...")'
	@if command -v uv >/dev/null; then \
	    set -e; export UV_FIND_LINKS="$${PIP_FIND_LINKS:-}"; \
	    test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV); \
	    uv pip install --python $(BIN)/python -r requirements.lock; \
	    uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
	    set -e; \
	    test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV); \
	    $(BIN)/pip install --disable-pip-version-check --progress-bar off -r requirements.lock; \
	    $(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

demo: setup
	@launch/demo.sh

# Two at a time, whatever the machine has: many tests start two to four processes of their own.
# They start some thousand processes: compiled modules are kept, even where the environment says otherwise.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist loadfile

test: setup
	$(PYTEST)

test-all: setup
	$(PYTEST) -m "not gpu and not slurm and not hosts" --timeout 3600

# A Slurm of its own on loopback, as root with apt; else it skips. About five minutes; ONLY='-k requeued' runs one case.
test-slurm: setup
	$(BIN)/python -m pytest -n 0 -rs -m slurm tests/slurm --timeout 1800 $(ONLY)

# Network namespaces as hosts, as root; else it skips. About five minutes.
test-hosts: setup
	$(BIN)/python -m pytest -n 0 -rs -m hosts tests/hosts --timeout 900 $(ONLY)

bench-planner: setup
	$(BIN)/llmtrain bench planner out=plans/accuracy.json

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find llmtrain tests -name __pycache__ -type d -prune -exec rm -rf {} +
