# Two commands do all the set-up: make demo, make test. Everything lands in .venv, _runs and _book, which git ignores.
PYTHON ?= python3
BIN := .venv/bin
# Data sets that do not come as packages; tests and chapters say what they skip without them.
ifndef DEFECTBOOK_DATA
ifneq ($(wildcard ../shared/data),)
export DEFECTBOOK_DATA := $(abspath ../shared/data)
endif
endif

# glibc returns every large array to the system at once, and on virtual machines faulting the pages in again costs more than
# the arithmetic: a third of PatchCore's prediction time here. Keeping them is safe, since the processes are short.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 4000000000

.PHONY: demo test test-slow book bench export lint clean
.DEFAULT_GOAL := demo

demo: .make/demo  ## fit PatchCore on real solar cells, store the run, build the book
	$(BIN)/python tools/demo.py

test: .make/test  ## all gates but the slow ones
	$(BIN)/python -m pytest -m "not slow"

test-slow: .make/test  ## kills, long fuzzing, the book in a browser
	$(BIN)/python -m pytest -m slow

book: .make/test  ## build the book from the stored runs
	$(BIN)/python tools/book.py

bench: .make/test  ## one JSON object a line
	@for file in $(filter-out benchmarks/timing.py,$(wildcard benchmarks/*.py)); do echo "# $$file" >&2; $(BIN)/python $$file || exit 1; done

export: .make/test  ## notebooks -> library, and strip outputs
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/nbdev_clean --fname index.ipynb

lint: .make/test
	$(BIN)/ruff check .

clean:
	rm -rf .venv .make _book _runs

.make/%: pyproject.toml constraints.txt tools/install.py
	$(PYTHON) tools/install.py $*
	@mkdir -p .make && touch $@
