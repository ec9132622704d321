# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Python compiles what is imported, which is a small part of what is installed.
PIP := $(BIN)/pip install --quiet --no-compile
HUB2 := .venv/hub2
# Without torch or mopt: the pages are text, and scripts/make writes what of them is generated.
DOCS := .venv/docs
SGLANG := .venv/engines/sglang
# Exports that ModelOpt makes for the tests: tests/conftest.py says what they are.
EXPORTS := .venv/exports
ALL_EXPORTS := $(EXPORTS)/exports/done $(EXPORTS)/families/done
# Neighbours stay on one worker, which makes their fixtures once, until the other has nothing left to do.
PYTEST := MOPT_TEST_EXPORTS=$(CURDIR)/$(EXPORTS) $(BIN)/pytest -n 2 --dist worksteal

.PHONY: demo test ready test-long quality docs engines mutants reliability fuzz tiny-pipeline

# torch first, from the pin: a range could bring another build of several gigabytes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[modelopt,dev]'
# Alone, for its own checks of operands: what it asks for besides is several gigabytes of CUDA.
	$(PIP) --no-deps -c constraints.txt flashinfer-python apache-tvm-ffi
	touch $@

# The next major version of huggingface_hub, to be put in front of the one that transformers takes.
$(HUB2)/installed: $(INSTALLED) constraints-hub2.txt
	rm -rf $(HUB2)
	$(PIP) --no-deps --target $(HUB2) -r constraints-hub2.txt
	touch $@

# A real ModelOpt export of a small FLUX.1 on the CPU, and the mixed repo built from it. Then a tiny FLUX.1 that was
# trained, built in both formats and by a preset that mopt advises, and a sheet of what base, NVFP4, FP8 and the advised
# checkpoint draw: demo/pictures.html. Two pictures judge a unit here, so that the demo stays short.
TINY := tests/data/tiny_flux1
demo: $(INSTALLED)
	$(BIN)/python scripts/make/make_export.py demo nvfp4
	$(BIN)/mopt build-nvfp4 --preset flux1-dev --export demo/nvfp4 --base demo/base --output demo/flux1-dev-nvfp4 --overwrite
	$(BIN)/mopt build-nvfp4 --preset flux1-dev --base $(TINY) --output demo/nvfp4-pictures --overwrite
	$(BIN)/mopt convert-fp8 --preset flux1-dev --base $(TINY) --output demo/fp8-pictures --overwrite
	printf '%s\n' 'a red seven' 'a green three' 'a blue zero' 'a yellow six' > demo/prompts.txt
	$(BIN)/mopt advise $(TINY) --pipeline $(TINY) --prompts demo/prompts.txt --effective-bits 6 --scored 2 --points 0 \
		--steps 6 --size 32 --output demo/advised.toml
	$(BIN)/mopt build-nvfp4 --preset demo/advised.toml --base $(TINY) --output demo/advised-pictures --overwrite
	$(BIN)/mopt compare demo/nvfp4-pictures demo/fp8-pictures demo/advised-pictures --base $(TINY) --pipeline $(TINY) \
		--prompts demo/prompts.txt --seeds 2 --steps 6 --size 32 --report demo/pictures.html

$(ALL_EXPORTS): $(INSTALLED) scripts/make/make_export.py scripts/make/tiny_models.py
	rm -rf $(@D)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/make/make_export.py $(@D) $(if $(findstring families,$@),--family all nvfp4 fp8,all)
	touch $@

# Here mopt's own code is all that is judged: answers that lie and stall, ranges, leaks.
WHICHEVER_CLIENT := checkpoint/hub/test_answers checkpoint/hub/test_hostile checkpoint/hub/test_ranges \
	commands/push/test_hostile_hub commands/push/test_leaks
# What is fetched and what is computed, side by side.
test: $(INSTALLED)
	$(MAKE) --jobs=3 ready
	$(PYTEST)
	MOPT_TEST_HUB=2 PYTHONPATH=$(CURDIR)/$(HUB2) $(PYTEST) tests/support/test_loopback_hub.py tests/checkpoint/hub \
		tests/commands/push $(WHICHEVER_CLIENT:%=--ignore tests/%.py)

ready: $(SGLANG)/installed $(ALL_EXPORTS) $(HUB2)/installed quality docs

# What takes too long for every change: random histories of OUT, full sizes, a million tensors, damage at many places. Not
# part of CI.
test-long: $(INSTALLED) $(ALL_EXPORTS)
	MOPT_TEST_LONG=1 $(PYTEST) tests/long tests/checkpoint/test_bounds.py tests/stage/test_crash.py \
		tests/stage/test_crash_twice.py tests/stage/test_powerloss.py tests/stage/test_race.py tests/cli/test_crash.py \
		tests/cli/test_errno.py tests/cli/test_signals.py tests/commands/test_reads_that_fail.py \
		tests/proof/test_planted.py tests/proof/test_search.py \
		tests/verification/test_record.py tests/checkpoint/hub/test_hostile.py tests/commands/push/test_hostile_hub.py

# Every family and format in the engines' own loaders; what they make of it goes to docs/engines.md. Five minutes, most of
# them downloads: not part of CI, where SGLang alone loads three families.
engines: $(INSTALLED)
	$(BIN)/python scripts/engines/kit.py --write

$(SGLANG)/installed: $(INSTALLED) scripts/engines/engines.toml
	$(BIN)/python scripts/engines/set_up.py sglang $(SGLANG)

# The small pipeline of tests/data, trained anew: ten minutes on two cores. Weights differ from machine to machine, so
# that a change of the script is committed with what it wrote.
tiny-pipeline: $(INSTALLED)
	$(PIP) scikit-learn
	$(BIN)/python scripts/make/make_tiny_pipeline.py tests/data/tiny_flux1

quality: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pages as a site, in .venv/docs/site; mkdocs.yml makes a broken link an error.
docs: $(DOCS)/installed
	$(DOCS)/bin/mkdocs build

$(DOCS)/installed: constraints-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --no-deps -r constraints-docs.txt
	touch $@

# Takes away one guard of the output protocol at a time and expects a test to go red; some minutes, not part of CI.
mutants: $(INSTALLED)
	$(BIN)/python scripts/reliability/mutants.py --write

# Every tier of docs/reliability.md, run again; half an hour and more on two cores, not part of CI.
reliability: $(INSTALLED)
	$(BIN)/python scripts/reliability/reliability.py --write

# Ten minutes for each parser. What is found lies in the current folder as crash-*; it belongs in tests/checkpoint/fuzz_corpus.
FUZZ_SECONDS ?= 600
fuzz: $(INSTALLED)
	$(PIP) -c constraints.txt -e '.[fuzz]'
	for name in header index; do \
		mkdir -p .venv/fuzz/$$name && $(BIN)/python scripts/reliability/fuzz_$$name.py -max_total_time=$(FUZZ_SECONDS) -max_len=2048 \
			-dict=tests/checkpoint/fuzz_corpus/words.dict .venv/fuzz/$$name tests/checkpoint/fuzz_corpus/$$name || exit 1; \
	done
