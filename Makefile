# Every target does its own set-up: a virtual environment in .venv, with uv where it is there, else with venv and pip.
PYTHON ?= python3
BIN := .venv/bin
INPUTS := pyproject.toml README.md

.PHONY: help setup demo test servers quick lint types bench screens chaos clean
help:  ## what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: .venv/ready  ## make .venv with tako and its tools

.venv/ready: $(INPUTS)
	@if command -v uv >/dev/null 2>&1; then \
	    uv venv --quiet --allow-existing --python $(PYTHON) .venv && \
	    uv pip install --quiet --python $(BIN)/python -e . --group dev; \
	else \
	    $(PYTHON) -m venv .venv && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1' && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -e . --group dev; \
	fi
	@touch $@

demo: setup  ## the main job, from an empty folder to a run that survived its worker's death
	@$(BIN)/python tests/demo.py

# Most tests wait for processes of their own: several at a time, each file whole in one of them.
TOGETHER := -n 4 --dist loadfile

test: lint types  ## everything that CI runs
	$(BIN)/python -m pytest $(TOGETHER) -m "not lasting" || { \
	    echo "Again, one at a time, what has failed beside others:"; \
	    $(BIN)/python -m pytest -m "not lasting" --last-failed --last-failed-no-failures none; }

servers: setup  ## all deploys to real servers: Debian and Ubuntu with systemd, which lose their power, cable and disk
	$(BIN)/python -m pytest -n 3 --dist loadfile tests/test_deploy.py tests/test_deploy_cut.py tests/test_deploy_refused.py \
	    tests/test_deploy_shared.py tests/test_operate.py

quick: setup  ## the fast tests
	$(BIN)/python -m pytest $(TOGETHER) -m "not slow and not lasting"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# What tako is measured beside has an environment of its own: Python's packages, and Restate's server from npm. What this
# machine cannot have is said, here and in the result, and the others are measured.
.bench/ready: $(INPUTS) benchmarks/peers/requirements.txt benchmarks/peers/package.json
	@$(PYTHON) -m venv .bench/venv
	@.bench/venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[postgres]'
	@while read each; do \
	    .bench/venv/bin/python -m pip install --quiet --disable-pip-version-check "$$each" || echo "CANNOT BE INSTALLED: $$each"; \
	done < benchmarks/peers/requirements.txt
	@mkdir -p .bench/node && cp benchmarks/peers/package.json .bench/node/
	@npm install --prefix .bench/node --ignore-scripts --no-audit --no-fund --silent || echo "CANNOT BE INSTALLED: restate-server"
	@touch $@

bench: .bench/ready  ## tako beside its peers and the floor (QUICK=1, LONG=1, RESUME=1: docs/measured.md)
	.bench/venv/bin/python -m benchmarks $(if $(QUICK),--quick) $(if $(LONG),--long) $(if $(RESUME),--resume)

screens: setup  ## the screens of the documentation, from a real terminal
	$(BIN)/python tests/screens.py

chaos: setup  ## a night of crashes: 2,000 runs, 50 kills and stops at random
	$(BIN)/python tests/chaos.py

clean:
	rm -rf .venv .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
