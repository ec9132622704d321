# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
HUB2 := .venv/hub2
SGLANG := .venv/engines/sglang

.PHONY: demo test test-long quality engines mutants reliability fuzz

# torch first, from the pin: a range could bring another build of several gigabytes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[modelopt,dev]'
# Alone, for its own checks of operands: what it asks for besides is several gigabytes of CUDA.
	$(BIN)/pip install --quiet --no-deps --no-compile -c constraints.txt flashinfer-python apache-tvm-ffi
	touch $@

# The next major version of huggingface_hub, to be put in front of the one that transformers takes.
$(HUB2)/installed: $(INSTALLED) constraints-hub2.txt
	rm -rf $(HUB2)
	$(BIN)/pip install --quiet --no-deps --target $(HUB2) -r constraints-hub2.txt
	touch $@

# A real ModelOpt export of a small FLUX.1 on the CPU, and the mixed repo built from it.
demo: $(INSTALLED)
	$(BIN)/python scripts/make/make_export.py demo nvfp4
	$(BIN)/mopt build-nvfp4 --preset flux1-dev --export demo/nvfp4 --base demo/base --output demo/flux1-dev-nvfp4 --overwrite

test: $(INSTALLED) $(HUB2)/installed $(SGLANG)/installed quality
	$(BIN)/pytest -n 2
# But for a Hub that lies and stalls: what it says is judged by mopt's own code, whichever the client.
	MOPT_TEST_HUB=2 PYTHONPATH=$(CURDIR)/$(HUB2) $(BIN)/pytest -n 2 tests/support/test_loopback_hub.py tests/checkpoint/hub \
		tests/commands/push --ignore tests/checkpoint/hub/test_hostile.py --ignore tests/commands/push/test_hostile_hub.py

# What takes too long for every change: random histories of OUT, full sizes, a million tensors, damage at many places. Not
# part of CI.
test-long: $(INSTALLED)
	MOPT_TEST_LONG=1 $(BIN)/pytest -n 2 tests/long tests/checkpoint/test_bounds.py tests/stage/test_crash.py \
		tests/stage/test_crash_twice.py tests/cli/test_crash.py tests/cli/test_errno.py tests/commands/test_reads_that_fail.py tests/proof/test_planted.py tests/proof/test_search.py \
		tests/verification/test_record.py tests/checkpoint/hub/test_hostile.py tests/commands/push/test_hostile_hub.py

# Every family and format in the engines' own loaders; what they make of it goes to docs/engines.md. Five minutes, most of
# them downloads: not part of CI, where SGLang alone loads three families.
engines: $(INSTALLED)
	$(BIN)/python scripts/engines/kit.py --write

$(SGLANG)/installed: $(INSTALLED) scripts/engines/engines.toml
	$(BIN)/python scripts/engines/set_up.py sglang $(SGLANG)

quality: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Takes away one guard of the output protocol at a time and expects a test to go red; some minutes, not part of CI.
mutants: $(INSTALLED)
	$(BIN)/python scripts/reliability/mutants.py --write

# Every tier of docs/reliability.md, run again; half an hour and more on two cores, not part of CI.
reliability: $(INSTALLED)
	$(BIN)/python scripts/reliability/reliability.py --write

# Ten minutes for each parser. What is found lies in the current folder as crash-*; it belongs in tests/checkpoint/fuzz_corpus.
FUZZ_SECONDS ?= 600
fuzz: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[fuzz]'
	for name in header index; do \
		mkdir -p .venv/fuzz/$$name && $(BIN)/python scripts/reliability/fuzz_$$name.py -max_total_time=$(FUZZ_SECONDS) -max_len=2048 \
			-dict=tests/checkpoint/fuzz_corpus/words.dict .venv/fuzz/$$name tests/checkpoint/fuzz_corpus/$$name || exit 1; \
	done
