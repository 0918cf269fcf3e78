# make demo   set up .venv and generate a video on the embedded tiny model
# make demo-ray   the same on a Ray cluster of two nodes on this machine, two videos at once
# make test   set up .venv, lint, and run the tests
# make test-ray   the tests that start Ray clusters, which take longer

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-ray test test-ray lint format clean

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,cluster]'
	touch $@

demo: $(INSTALLED)
	mkdir -p outputs
	$(BIN)/torchrun --nproc_per_node 2 -m helios_cp.generate \
		--model tiny-distilled --prompt "a red fox running through fresh snow" \
		--height 128 --width 192 --num-frames 99 \
		--output outputs/demo.mp4 --report outputs/demo.json

demo-ray: $(INSTALLED)
	$(BIN)/python -m launchers.demo --output outputs/demo-ray

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -m "not ray"

test-ray: $(INSTALLED)
	$(BIN)/python -m pytest -m ray

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
