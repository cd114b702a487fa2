# make train [key=value ...]    learn a game; make train env=ALE/Breakout-v5 seed=1; flags in args: make train seed=0,1 args=-m
# make test                     the linters and the tests; make test args="tests/envs -k size"
# Needs Python 3.11 or newer and make; PYTHON=... names another interpreter than python3.

PYTHON ?= python3
# --no-compile: Python compiles what it uses when it first does, which is a tenth of what is installed.
INSTALL = .venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt
# What the command line says in the form key=value is meant for the program.
KEYS = $(filter-out PYTHON=% args=%,$(MAKEOVERRIDES))

# What Python has compiled is kept, or each of the many processes would do so again: importing torch alone takes 4 s then.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test install
.DEFAULT_GOAL := train

train: install
	.venv/bin/python main.py $(KEYS) $(args)

# mypy has one core to itself for half a minute: it reads while the tests begin.
test: .venv/installed-test
	.venv/bin/python -m ruff check --quiet .
	@.venv/bin/python -m mypy & types=$$!; \
	.venv/bin/python -m pytest -n auto --dist worksteal $(args); tests=$$?; \
	wait $$types && exit $$tests

install: .venv/installed

.venv/installed: EXTRA = play
.venv/installed-test: EXTRA = test
.venv/installed .venv/installed-test: setup.cfg constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: install one, or name it: make PYTHON=/path/to/python" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	@echo "Installing torch and the rest into .venv; this takes some minutes, once."
	$(INSTALL) torch
	@# compat: a plain path, so that the package is found in any folder, also one that holds a runs/ of its own.
	$(INSTALL) --config-settings editable_mode=compat --editable '.[$(EXTRA)]'
	@# OpenCV needs libGL, which servers and containers lack; the same OpenCV without windows does not.
	@.venv/bin/python -c 'import cv2' 2>/dev/null || { .venv/bin/python -m pip uninstall --quiet --yes opencv-python && $(INSTALL) --force-reinstall --no-deps opencv-python-headless; }
	@# CarRacing's physics, where there is a wheel of it: building it from source needs more than Python.
	@$(INSTALL) --only-binary :all: 'gymnasium[box2d]' 2>/dev/null || echo "CarRacing's physics (Box2D) has no wheel for this Python: all other games work."
	@touch .venv/installed $@  # what the tests need holds what training needs
