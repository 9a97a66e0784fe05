# make setup | demo | test | test-fast | test-image | lint | bench-setup | bench | soak: each sets up what it needs. ARGS="..." is handed on,
# as in  make demo ARGS="--fresh"  or  make test ARGS="-k shards".

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := demo
.PHONY: setup demo test test-fast test-system test-image lint bench-setup bench soak

# The first interpreter that pyproject.toml admits and that can make a virtual environment.
PYTHON ?= $(shell for python in python3.11 python3 python3.12; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	2>/dev/null && echo $$python && break; done)
VENV := .venv
ARGS ?=

# The stamp holds the digest of what was installed, so that a new lock or dependency sets up again.
STAMP := $(VENV)/.setup-$(shell cat requirements.lock pyproject.toml | sha256sum | cut -c 1-16)

# More threads than cores slow small models down, and every Ray worker would start as many.
export OMP_NUM_THREADS ?= $(shell nproc)
export RAY_USAGE_STATS_ENABLED := 0
export NO_ALBUMENTATIONS_UPDATE := 1

setup: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "error: found no Python 3.11 or 3.12 with venv," \
		"expected one on PATH; install python3.11 and python3.11-venv, or name one: make PYTHON=..." >&2; exit 2; }
	@echo "setting up $(VENV): a minute and a half and 6.5 GB, once"
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-deps --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	@# uv does not read pip's configuration: its index is handed on. The cache lies beside the packages,
	@# so that files are linked, not copied, and no home is needed.
	index=$${PIP_INDEX_URL:-$$($(VENV)/bin/pip config get global.index-url 2>/dev/null || true)}; \
	[[ -z $$index ]] || export UV_DEFAULT_INDEX=$$index; \
	export UV_PYTHON=$(VENV)/bin/python UV_CACHE_DIR=$${UV_CACHE_DIR:-$(VENV)/.uv-cache}; \
	$(VENV)/bin/uv pip install --quiet --no-deps -r requirements.lock && \
	$(VENV)/bin/uv pip install --quiet --no-deps --no-build-isolation -e . && rm -rf $(VENV)/.uv-cache
	$(VENV)/bin/pip check
	@# Compiled once, on all cores: every Ray worker imports torch, and from source that takes 25 s.
	@# What does not compile (templates, files for other Pythons) is not imported either; of what only
	@# tests import, few files are.
	@env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -m compileall -q -q -j 0 \
		-x '/(tests?|diffusers|moto|playwright|sklearn|transformers/models)/' \
		$(VENV)/lib/python3*/site-packages || true
	@rm -f $(VENV)/.setup-* && touch $@

demo: $(STAMP)
	$(VENV)/bin/python cluster/demo.py $(ARGS)

# Files of fast tests run side by side, one thread each. The slow ones come one by one: each starts
# Ray with all its processes, and some have deadlines.
JOBS ?= $(shell nproc)
# Of two selections one may well be empty, where ARGS selects further: pytest's exit code 5.
MAY_BE_EMPTY := $(if $(ARGS),|| (( $$? == 5 )))
test test-fast: export OMP_NUM_THREADS := 1
test-fast: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not soak" --durations=12 $(ARGS) $(MAY_BE_EMPTY)

test: test-fast
	$(VENV)/bin/python -m pytest -m "slow and not soak" --durations=12 $(ARGS) $(MAY_BE_EMPTY)

# What some tests drive: a browser, Prometheus with promtool, Alertmanager, Redis. For root, on Debian and its kin.
SYSTEM_PACKAGES := chromium prometheus prometheus-alertmanager redis-server
test-system:
	dpkg -s $(SYSTEM_PACKAGES) >/dev/null 2>&1 || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES); }

# The image, built and run: eight minutes. For root, on Debian and its kin.
IMAGE_PACKAGES := catatonit mmdebstrap podman runc
test-image: export OMP_NUM_THREADS := 1
test-image: $(STAMP)
	dpkg -s $(IMAGE_PACKAGES) >/dev/null 2>&1 || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(IMAGE_PACKAGES); }
	$(VENV)/bin/python -m pytest -s tests/test_cluster_image.py --durations=12 $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports --no-logo

# Peers whose pins clash with ours, over the packages of $(VENV), which their own hide.
BENCH_STAMP := .venv-bench/.setup-$(shell cat benchmarks/requirements.txt | sha256sum | cut -c 1-16)

bench-setup: $(BENCH_STAMP)

$(BENCH_STAMP): | $(STAMP)
	$(VENV)/bin/python -m venv .venv-bench
	@$(VENV)/bin/python -c 'import os, sysconfig; print(sysconfig.get_path("purelib"), os.getcwd(), sep="\n")' \
		> "$$(.venv-bench/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	.venv-bench/bin/pip install --no-deps --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@rm -f .venv-bench/.setup-* && touch $@

# make bench ARGS=--quick runs all of them at small sizes.
bench: $(STAMP) $(BENCH_STAMP)
	@shopt -s nullglob; scripts=(benchmarks/[!_]*.py); \
	(( $${#scripts[@]} )) || { echo "error: benchmarks/ holds no script" >&2; exit 2; }; \
	failed=0; for script in "$${scripts[@]}"; do echo "== $$script"; \
	$(VENV)/bin/python "$$script" $(ARGS) || failed=1; done; exit $$failed

soak: $(STAMP)
	$(VENV)/bin/python -m pytest -m soak $(ARGS) $(MAY_BE_EMPTY)
	$(VENV)/bin/python -m pytest -s tests/test_cluster_image.py $(ARGS) $(MAY_BE_EMPTY)
