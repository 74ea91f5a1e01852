# make install   a .venv with the pinned packages
# make demo      train 12 small models on Fashion-MNIST and write the report (about 8 minutes on 2 cores)
# make test      the whole test suite
# make check     ruff, mypy, import-linter
# make fix       let ruff format and repair
.PHONY: install install-dev demo test check fix

BIN := .venv/bin

install:
	@scripts/install run

install-dev:
	@scripts/install dev

demo: install
	@scripts/demo

test: install-dev
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/slurm
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/slurm # clusters want the machine for themselves

check: install-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

fix: install-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
