# make demo | test | soak | bench | mutants | lint | clean. The first `make demo` makes .venv with the package alone (half a minute);
# the first `make test` brings what tests need (a few minutes, apt-get among it where it may). Later runs start at once.
# PYTHON=python3.12 chooses the interpreter, ARGS="-k cache" goes to pytest or to the benchmark. WORKERS=4 runs the
# tests in so many processes (0: in one, for ARGS=--pdb); each takes up to 2 GB.

VENV := .venv
MADE := $(VENV)/.made
TESTED := $(VENV)/.tested
PLOTS := $(VENV)/.plots
WORKERS := 2

new_enough := import sys; sys.exit(sys.version_info < (3, 10))
can_make_venv := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
first_python = $(shell for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10); do \
	"$$python" -c '$(1)' >/dev/null 2>&1 && echo "$$python" && break; done)
no_python := mlx-qwen35 needs Python 3.10 or newer; install it from https://www.python.org/downloads/ or with a package \
	manager (macOS: brew install python; Debian and Ubuntu: apt-get install python3 python3-venv)
intel := import platform, sys; sys.exit((sys.platform, platform.machine()) != ("darwin", "x86_64"))
no_mlx := this Python is made for Intel processors, for which there is no MLX: it takes a Mac with Apple silicon and a \
	Python for it (arm64, not under Rosetta), or Linux
no_venv := this Python cannot make virtual environments; install what it lacks: apt-get install python3-venv

# The Linux wheel of MLX calls a slow reference BLAS; with OpenBLAS in front of it products are 30 times faster. `make
# demo` takes it where it is and does without it elsewhere; its model is so small that the answer comes at once.
openblas = $(shell ls /usr/lib/*/openblas-pthread/libopenblas.so.0 /usr/lib64/libopenblasp.so.0 2>/dev/null | head -n 1)
can_install = $(shell test "$$(uname -s)" = Linux -a "$$(id -u)" = 0 && command -v apt-get)
install = for step in install update install; do \
	if [ $$step = update ]; then apt-get -qq update; else apt-get -qq -y install $(1) && break; fi; \
	done >/dev/null 2>&1 || true
# The tests emulate Metal's kernels with it; without, they skip that.
clang = $(shell command -v clang++-19)
# They drive the page in it, and skip that without. (Ubuntu's is a snap.)
chromium = $(shell command -v chromium || grep -qs '^ID=debian' /etc/os-release || echo none)
# They press Tab in these, or skip that.
shells = $(shell command -v zsh >/dev/null && command -v fish)
# A processor that is newer than OpenBLAS gets its kernels of 2004, with which prompts take twice as long.
kernels = $(shell grep -qw avx512bw /proc/cpuinfo && echo SkylakeX || grep -qw avx2 /proc/cpuinfo && echo Haswell)
coretype = $(or $(OPENBLAS_CORETYPE),$(firstword $(kernels)))
run = $(if $(openblas),$(if $(coretype),OPENBLAS_CORETYPE=$(coretype)) LD_PRELOAD=$(openblas)) $(VENV)/bin/python
# Each worker's products in one thread of its own: threads that wait for one another take more than they bring. And
# bytecode is written, whatever is set: some hundred processes are started, each of which would compile the package.
pytest = PYTHONDONTWRITEBYTECODE= OPENBLAS_NUM_THREADS=$(or $(OPENBLAS_NUM_THREADS),1) $(run) -m pytest \
	-n $(WORKERS) --dist worksteal

.PHONY: demo test soak bench mutants lint clean

question := What is 17 + 25?

demo: $(MADE)
	@echo "> $(question)"
	@$(run) generate.py -p "$(question)" --temperature 0 --stats

test: $(TESTED)
	@$(pytest) $(ARGS)

# What is too long for every change (docs/TESTS.md): once a week.
soak: $(TESTED)
	@$(pytest) -m "soak or not soak" --hypothesis-profile=soak $(ARGS)

bench: $(PLOTS)
	@$(run) benchmarks/bench.py $(ARGS)

# Plants faults, and says which the tests do not notice (tools/mutants.py): ARGS="--count 300 --room engine".
mutants: $(TESTED)
	@$(run) tools/mutants.py $(ARGS)

lint: $(TESTED)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis .metal_emulator .published
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(MADE): pyproject.toml
	$(eval python := $(call first_python,$(can_make_venv)))
	$(if $(python),,$(error $(if $(call first_python,$(new_enough)),$(no_venv),$(no_python))))
	$(if $(shell "$(python)" -c '$(intel)' 2>/dev/null && echo intel),$(error $(no_mlx)))
	@echo "Making $(VENV) with $(python): half a minute, once."
	@$(python) -m venv --clear $(VENV)
	@$(pip) --editable .
	@touch $@

# What pip compiles beforehand would be a third of the time and of the bytes; Python compiles what it needs.
pip = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile

$(TESTED): $(MADE)
	@echo "Installing what the tests need into $(VENV): a few minutes, once."
	@$(pip) --editable '.[test]'
	@$(if $(can_install),$(if $(openblas),,$(call install,libopenblas0-pthread)))
	@$(if $(can_install),$(if $(clang),,$(call install,clang-19 libclang-rt-19-dev)))
	@$(if $(can_install),$(if $(chromium),,$(call install,--no-install-recommends chromium)))
	@$(if $(can_install),$(if $(shells),,$(call install,zsh fish)))
	@touch $@

$(PLOTS): $(TESTED)
	@$(pip) --editable '.[plots]'
	@touch $@
