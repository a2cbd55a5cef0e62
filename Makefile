# `make demo` and `make test` work on a machine that has python3 and make and nothing else:
# both create .venv here and install into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The lower ends of the declared ranges are tried on the oldest Python, where there is one.
OLDEST_PYTHON ?= $(PYTHON)

.PHONY: demo test test-slow test-oldest test-python lint types docs gallery examples package release-dry-run clean

# Says what it does and how far it is, in both of its parts.
demo: $(VENV)/.examples
	@echo "Loading torch, then training with and without the callback (some minutes on two cores):"
	@$(BIN)/python -m examples.demo

# One process a core with one thread each; a file stays in one process, for what its tests share.
PYTEST := -m pytest -n auto --dist loadfile
test test-slow test-oldest test-python: export OMP_NUM_THREADS = 1

test: $(VENV)/.dev
	$(BIN)/python $(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python $(PYTEST) -m slow

# The tests of the core's rooms, which mirror src/newton_plugin.
CORE_TESTS := $(addprefix tests/,boundary curvature derivatives doors faults functional identities linalg runtime step)

# The lower ends of the declared ranges, in an environment of their own (a download of several GB on Linux).
test-oldest: .venv-oldest/.test
	.venv-oldest/bin/python $(PYTEST) -m "not slow" $(CORE_TESTS) tests/lightning tests/distributed

.venv-oldest/.test: pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[test]"
	@touch $@

# A quick part of the core and the Lightning callback, in the environment VENV that .ci/pythons makes for each Python.
test-python:
	$(BIN)/python $(PYTEST) -m "not slow" $(addprefix tests/,doors identities runtime step lightning)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site build/site/index.html, from README, docs/ and benchmarks/ as they are; nothing is fetched.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env -j 1 -q -b html -c docs . build/site

gallery: $(VENV)/.examples
	$(BIN)/python -m examples.gallery

# Every example as a user would run it, only shorter; and the examples inside docstrings.
examples: $(VENV)/.dev
	$(BIN)/python -m examples.demo --seeds 2 --steps 30 --out $(VENV)/demo
	$(BIN)/python -m newton_plugin_lightning fit --config examples/rank_digits.yaml \
		--trainer.max_steps=60 --trainer.default_root_dir=$(VENV)/cli
	$(BIN)/python -m newton_plugin_lightning fit --config examples/shortest_path.yaml \
		--trainer.max_steps=20 --model.loss=fenchel_young --trainer.default_root_dir=$(VENV)/cli \
		--trainer.logger.init_args.save_dir=$(VENV)/cli
	$(BIN)/python -m examples.terrain
	$(BIN)/python -m examples.assignment --seeds 1 --steps 20
	$(BIN)/python -m examples.convex_programs
	$(BIN)/python -m examples.portfolio --steps 20
	$(BIN)/python -m examples.noisy_rankings --steps 60
	$(BIN)/python -m examples.bilevel_lightning --epochs 10
	$(BIN)/python -m examples.gallery --out $(VENV)/gallery
	$(BIN)/python -m examples.plain_loop --steps 60
	$(BIN)/python -m examples.ensemble --steps 20
	$(BIN)/python -m examples.fabric_loop --steps 60
	$(BIN)/python -m examples.accelerate_loop --steps 60
	$(BIN)/python -m examples.ignite_engine --steps 60
	$(BIN)/python -m examples.skorch_net --epochs 3
	$(BIN)/python -m examples.transformers_trainer --steps 20
	$(BIN)/python -m newton_plugin_lightning fit --config examples/classify_digits.yaml \
		--trainer.max_steps=40 --trainer.default_root_dir=$(VENV)/cli --trainer.logger.init_args.save_dir=$(VENV)/cli
	$(BIN)/python -m pytest --doctest-modules src integrations -p no:cacheprovider

# What a release uploads, in an environment that has nothing of this checkout: with torch alone, then with the extras.
CLEAN := $(VENV)/clean
package: $(VENV)/.dev
	rm -rf dist $(CLEAN)
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	$(CLEAN)/bin/python -I tests/packaging/installed.py
	$(CLEAN)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(echo dist/*.whl)[lightning,transformers]"
	$(CLEAN)/bin/python -I tests/packaging/installed.py lightning transformers
	rm -rf $(CLEAN)

# RELEASING.md as far as a machine can follow it; nothing is uploaded, tagged or changed.
release-dry-run:
	.ci/release-dry-run

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.examples: pyproject.toml constraints.txt $(VENV)/.python
	@echo "Installing torch, Lightning, scikit-learn, matplotlib and what they need, into $(VENV):"
	@$(BIN)/python -m examples.installing -c constraints.txt -e ".[examples]"
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.python
	$(PIP) -e ".[docs]"
	@touch $@

# It has what the others have.
$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.python
	$(PIP) -e ".[dev]"
	@touch $(VENV)/.examples $(VENV)/.docs $@

clean:
	rm -rf $(VENV) .venv-oldest build dist
