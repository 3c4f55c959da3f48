# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first; `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
UV := uv==0.13.9
# auto: PyTorch's CPU build on a machine without an NVIDIA driver, else its CUDA build. TORCH=cpu or TORCH=cuda decides.
TORCH ?= auto
CONFIG ?= configs/mini.yaml
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help setup demo serve released mlflow test test-unit test-integration test-security test-gpu test-slow mutants lint format lock docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: .venv/.installed ## make .venv and install the pinned requirements

# Another TORCH than the one that is installed: install again.
ifneq ($(filter cpu cuda,$(TORCH)),)
ifneq ($(shell cat .venv/.installed 2>/dev/null),$(TORCH))
.PHONY: .venv/.installed
endif
endif

.venv/.installed: requirements.lock requirements-cpu.lock pyproject.toml deploy/install.sh
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "Python 3.11 to 3.14 is needed, for which there are wheels of all packages; this is $$($(PYTHON) -V). Try make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(UV)"
	@deploy/install.sh $(TORCH) $@

demo: setup ## draw, prepare, train four stages, score, quantize, serve, ask: about ten minutes
	@$(BIN)/python jobs/demo.py --config $(CONFIG) output=outputs/demo

serve: setup ## serve the model that the demo trained, or else the shipped one, until Ctrl-C
	@artifact=outputs/demo/artifact; test -f $$artifact/config.json || artifact=; \
		$(BIN)/python jobs/serve_http.py --config $(CONFIG) artifact=$$artifact

released: setup ## the released model: fetch (8.6 GB), convert, quantize for this machine, serve; resumes
	@$(BIN)/python jobs/released.py device=auto output=outputs/released

mlflow: setup ## open the MLflow page of all runs that were started in this folder
	@echo "MLflow (Ctrl-C stops it): http://127.0.0.1:5000"; \
		echo "Click 'Model training' at its top left once, which the browser remembers: MLflow opens on pages for agents."; \
		MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow server --workers 1 --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///mlflow.db

test: test-unit test-integration ## all tests

test-unit: setup ## unit tests: offline, no cluster
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal tests/unit

test-integration: setup ## tests that start Ray, Serve and MLflow on loopback
	@$(BIN)/python -m pytest tests/integration

test-security: setup ## the tests that hold the promises of SECURITY.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "security and not slow" tests

test-gpu: setup ## tests that need a CUDA card
	@$(BIN)/python -m pytest tests/gpu tests/unit/kernels

test-slow: setup ## the tests that take minutes each: kills, several workers, the whole pipeline
	@$(BIN)/python -m pytest -m slow tests/integration

mutants: setup ## change the pure modules one operator at a time; every change must turn a test red (PIECES="gate media")
	@$(BIN)/python -m tests.mutants $(PIECES)

lint: setup ## ruff, formatting, types, spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@files=$$(git ls-files) && $(BIN)/codespell $$files

format: setup ## rewrite files in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: setup ## resolve requirements.lock and requirements-cpu.lock again from pyproject.toml
	@$(BIN)/uv pip compile pyproject.toml --extra pipelines --extra cluster --extra dev --extra docs --universal --python-version 3.11 \
		--no-header --quiet -o requirements.lock
	@grep -vE '^ |^(cuda-|nvidia-|triton==)' requirements.lock > requirements-cpu.lock

docs: setup ## build the documentation site into site/, offline
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

clean: ## remove results and caches, not .venv
	@rm -rf outputs .pytest_cache .ruff_cache .mypy_cache
