# `make quickstart` and `make test` each set up .venv from pinned versions and do the rest.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: quickstart test check soak clean

quickstart: .venv/installed
	$(BIN)/gdn quickstart

# Processes of the tests, a file each at a time: make test WORKERS=8.
test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for package in src/gdn src/gdn/*/; do printf '%6d lines  %s\n' "$$(cat $$package/*.py | wc -l)" "$$package"; done
	@printf '%6d lines  in all\n' "$$(find src -name '*.py' | xargs cat | wc -l)"

# Long, seeded fault tests; what they said last stands in docs/log.md.
soak: .venv/installed
	$(BIN)/python -m pytest -m soak

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "gdn needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,data,eval,fast,tensorboard,dev]'
	@touch $@

clean:
	rm -rf .venv runs
