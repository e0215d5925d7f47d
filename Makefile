# `make demo` shows it, `make test` proves it. Both install what they need into ./.venv first.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 3
export PYTHON

.PHONY: help demo up test check unit e2e proto chart format clean

help: ## Show the targets
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# What an installation is made from; the operators are compiled by it.
INSTALLED := pyproject.toml constraints.txt scripts/install setup.py $(wildcard native/*)

.venv/.run: $(INSTALLED)
	@scripts/install
	@touch $@

.venv/.dev: $(INSTALLED)
	@scripts/install dev
	@touch .venv/.run $@

demo: .venv/.run ## Start gateway, prefill and decode here, stream an answer, say how, stop
	@$(BIN)/tandem demo

up: .venv/.run ## The same, but stay up until Ctrl-C; ARGS="--model DIR --decode 2"
	@$(BIN)/tandem up $(ARGS)

test: check unit ## Everything that CI runs

check: .venv/.dev ## Lint, format, types, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tandem.rpc.generate --check
	$(BIN)/python -m deploy.dashboards.generate --check
	$(BIN)/python scripts/chart --check

unit: .venv/.dev ## The tests, slow ones beside the rest
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q $(ARGS)

e2e: .venv/.dev ## On a real Kubernetes (TANDEM_TEST_KUBECONFIG, or the test cluster beside the checkout)
	@scripts/e2e $(ARGS)

proto: .venv/.dev ## Generate services/tandem/rpc/gen from proto/
	$(BIN)/python -m tandem.rpc.generate

chart: .venv/.dev ## Generate the chart's schema and its table of values
	$(BIN)/python scripts/chart

format: .venv/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and all caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist services/*.egg-info
