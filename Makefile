# make install | lint | typecheck | test | test-slow | test-arviz1 | demo | bench | reproduce NAME=savae-mnist
PYTHON  ?= python3
VENV    := .venv
BIN     := $(CURDIR)/$(VENV)/bin
STAMP   := $(VENV)/.installed
JOBS    ?= 2

.PHONY: install lint typecheck test test-slow test-arviz1 demo bench reproduce clean

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

# mypy needs one real tree: a tree of links in which models and guides lie inside the package.
typecheck: $(STAMP)
	rm -rf build/mypy && mkdir -p build/mypy
	cp -as $(CURDIR)/pyrovae build/mypy/pyrovae
	cp -as $(CURDIR)/models build/mypy/pyrovae/models
	cp -as $(CURDIR)/guides build/mypy/pyrovae/guides
	cd build/mypy && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p pyrovae

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -q --durations=10 -m "not slow"

# Notebooks, reproductions from end to end, posteriordb: what seldom breaks and takes long.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -q --durations=10 -m slow

# The adapter for ArviZ >= 1 (Python 3.12 and newer) in an environment of its own, without torch.
test-arviz1: $(STAMP)
	@if python=$$(command -v python3.12) && $$python -c "" 2>/dev/null; then \
		set -e; \
		test -x build/arviz1/bin/python || $$python -m venv build/arviz1; \
		build/arviz1/bin/pip install --quiet "arviz>=1" h5netcdf h5py numpy; \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_export.py -k newer_arviz; \
	else \
		echo "test-arviz1 skipped: no working python3.12 on PATH (ArviZ >= 1 needs it)"; \
	fi

demo: $(STAMP)
	$(BIN)/pyrovae compare --data digits --out runs/demo

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

# Published results again; ARGS="--preset paper --device cuda" and so on. Data below PYROVAE_DATA.
reproduce: $(STAMP)
	@test -n "$(NAME)" || { echo "say which one: make reproduce NAME=savae-mnist"; exit 2; }
	$(BIN)/python benchmarks/reproduce.py $(NAME) $(ARGS)

clean:
	rm -rf build dist *.egg-info $(VENV)
