# make train [key=value ...]    learn a game; make train env=ALE/Breakout-v5 seed=1; flags in args: make train seed=0,1 args=-m
# make test                     run the tests
# Needs Python 3.11 or newer and make; PYTHON=... names another interpreter than python3.

PYTHON ?= python3
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# What the command line says in the form key=value is meant for the program.
KEYS = $(filter-out PYTHON=% args=%,$(MAKEOVERRIDES))

.PHONY: train test install
.DEFAULT_GOAL := train

train: install
	.venv/bin/python main.py $(KEYS) $(args)

test: install
	.venv/bin/python -m pytest $(args)

install: .venv/installed

.venv/installed: setup.cfg constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: install one, or name it: make PYTHON=/path/to/python" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	@echo "Installing torch and the rest into .venv; this takes some minutes, once."
	$(INSTALL) torch
	$(INSTALL) --editable '.[play,test]'
	@# OpenCV needs libGL, which servers and containers lack; the same OpenCV without windows does not.
	@.venv/bin/python -c 'import cv2' 2>/dev/null || { .venv/bin/python -m pip uninstall --quiet --yes opencv-python && $(INSTALL) --force-reinstall --no-deps opencv-python-headless; }
	@touch $@
