# Without make:  python3 deploy/preflight.py && .venv/bin/python -m deploy demo
# (for tests)    python3 deploy/preflight.py --extra test && .venv/bin/python -m pytest
PYTHON ?= python3
VENV = .venv/bin

.PHONY: demo test test-gpu chaos soak lint rules types setup setup-test setup-dev proto

demo: setup
	@exec $(VENV)/python -m deploy demo $(ARGS)

# Files side by side, those with clusters beside those without (tests/conftest.py). The long form is ARGS=--full.
test: setup-test
	@$(VENV)/python -m pytest $(or $(ARGS),-n 2)

# On a machine with an H100 or H200, after `pip install -e '.[gpu,test]'` beside a CUDA build of torch.
test-gpu:
	@$(PYTHON) -m pytest tests/gpu -n 8 $(ARGS)

# Faults at random moments under load, each request judged token by token: python -m tests.chaos says what the words mean.
FAULTS ?= 300
MINUTES ?= 30
SEED ?= 0
REPORT ?= .cache/chaos.jsonl
chaos: setup-test
	@mkdir -p $(dir $(REPORT))
	@$(VENV)/python -m tests.chaos --seed $(SEED) --faults $(FAULTS) --minutes $(MINUTES) --report $(REPORT) $(ARGS)

# Steady load with cancels; whatever grows is found by its slope. The plot goes to docs/images.
soak: setup-test
	@$(VENV)/python -m tests.chaos.soak --minutes $(MINUTES) $(ARGS)

# Types take longer than all the rest together: side by side with it.
lint: setup-dev
	@$(MAKE) --no-print-directory -j2 --output-sync=target rules types

rules:
	$(VENV)/ruff format --check
	$(VENV)/ruff check
	$(VENV)/lint-imports
	$(VENV)/deptry . --no-ansi
	$(VENV)/vulture
	$(VENV)/codespell

types:
	$(VENV)/basedpyright

proto: setup-dev
	$(VENV)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. cluster/protos/worker.proto

setup:
	@$(PYTHON) deploy/preflight.py

setup-test:
	@$(PYTHON) deploy/preflight.py --extra test

setup-dev:
	@$(PYTHON) deploy/preflight.py --extra dev

# Clients with pins of their own, each in an environment of its own (some hundred MB); tests/deploy/public uses them.
.PHONY: clients
clients: setup-dev
	for client in litellm lm-eval; do python3 -m venv .cache/clients/$$client || exit 1; done
	.cache/clients/litellm/bin/pip install -q litellm==1.83.0
	.cache/clients/lm-eval/bin/pip install -q -c constraints.txt 'lm-eval[api]==0.4.13' transformers
	$(VENV)/python -c 'from benchmarks.guidellm_driver import ensure; ensure()'
