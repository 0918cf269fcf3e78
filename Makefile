# make demo   set up .venv and make three short videos and a contact sheet with the embedded tiny model
# make demo-ray   the same on a Ray cluster of two nodes on this machine, two videos at once
# make live   a server on the embedded tiny model: open the address that it prints, type, and watch
# make test   set up .venv, lint, and run all tests, side by side
# make test-quick   what one runs while editing: no Ray, no torchrun, no whole videos on many ranks
# make test-ray   only those that start Ray clusters
# make tiny   train the embedded models on rendered clips, in outputs/tiny; hours, and a stop loses nothing
# make bench  the benchmarks on this machine's CPU, short, and the report of them in outputs/bench

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH := outputs/bench

WORKERS ?= 3
# Whole files, because their tests share what they have made, and in the order of tests/order.py.
SIDE_BY_SIDE := --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-ray live tiny test test-quick test-ray bench lint format clean

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,cluster,live]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m helios_cp.tiny.demo --output outputs/demo

demo-ray: $(INSTALLED)
	$(BIN)/python -m launchers.demo --output outputs/demo-ray

live: $(INSTALLED)
	$(BIN)/python -m launchers.serve --model tiny-distilled --height 64 --width 128 --data outputs/live

tiny: $(INSTALLED)
	nice $(BIN)/python -m helios_cp.tiny.train all --output outputs/tiny

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One worker more than two cores, because tests of processes wait most of the time.
test: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --numprocesses $(WORKERS)

test-quick: $(INSTALLED)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --numprocesses 2 -m "not ray and not slow"

test-ray: $(INSTALLED)
	$(BIN)/python -m pytest -m ray

bench: $(INSTALLED)
	mkdir -p $(BENCH)
	$(BIN)/python -m benchmarks.calibrate --output $(BENCH)/calibration.json
	$(BIN)/python -m benchmarks.validate_plan --quick --hardware $(BENCH)/calibration.json --output $(BENCH)/validate_plan.json
	$(BIN)/python -m benchmarks.forward --repeats 5 --output $(BENCH)/forward.json
	$(BIN)/python -m benchmarks.communication --ranks 2 4 --output $(BENCH)/communication.json
	$(BIN)/python -m benchmarks.attention --repeats 3 --output $(BENCH)/attention.json
	$(BIN)/python -m benchmarks.decode --repeats 2 --output $(BENCH)/decode.json
	$(BIN)/python -m benchmarks.scaling --layers 1 --repeats 3 --ranks 2 --output $(BENCH)/scaling.json
	$(BIN)/python -m benchmarks.fps --device cpu --chunks 2 --output $(BENCH)/fps.json
	$(BIN)/python -m benchmarks.deviation --quick --output $(BENCH)/deviation.json
	$(BIN)/python -m benchmarks.quality --quick --output $(BENCH)/quality.json
	$(BIN)/python -m benchmarks.pipeline --requests 40 --output $(BENCH)
	$(BIN)/python -m benchmarks.live --changes 5 --chunks 16 --turns 1 --viewers 1 10 --output $(BENCH)
	$(BIN)/python -m benchmarks.report --results $(BENCH)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
