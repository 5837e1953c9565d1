# Without make:  python3 deploy/preflight.py && .venv/bin/python -m deploy demo
# (and           python3 deploy/preflight.py && .venv/bin/python -m pytest)
PYTHON ?= python3
VENV = .venv/bin/python

.PHONY: demo test lint setup proto

demo: setup
	@$(VENV) -m deploy demo $(ARGS)

test: setup
	@$(VENV) -m pytest $(ARGS)

lint:
	@$(PYTHON) deploy/preflight.py --extra dev
	@$(PYTHON) deploy/preflight.py lint

proto:
	@$(PYTHON) deploy/preflight.py --extra dev
	@$(VENV) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. cluster/protos/worker.proto

setup:
	@$(PYTHON) deploy/preflight.py
