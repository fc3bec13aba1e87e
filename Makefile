# make install | lint | typecheck | test | demo | bench
PYTHON  ?= python3
VENV    := .venv
BIN     := $(CURDIR)/$(VENV)/bin
STAMP   := $(VENV)/.installed
JOBS    ?= 2

.PHONY: install lint typecheck test demo bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	# torch first and pinned: on a machine without GPU its CPU build is used where one is at hand.
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps torchvision==0.28.0
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .

# mypy needs one real tree: a farm of links in which models and guides lie inside the package.
typecheck: $(STAMP)
	rm -rf build/mypy && mkdir -p build/mypy
	cp -as $(CURDIR)/pyrovae build/mypy/pyrovae
	cp -as $(CURDIR)/models build/mypy/pyrovae/models
	cp -as $(CURDIR)/guides build/mypy/pyrovae/guides
	cd build/mypy && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p pyrovae

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -q --durations=10

demo: $(STAMP)
	$(BIN)/pyrovae compare --data digits --out runs/demo

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf build dist *.egg-info $(VENV)
