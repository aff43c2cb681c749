# Everything is built once, with --release: tests run real programs on a real
# model, and libtorch makes a second profile cost minutes and gigabytes.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKERS ?= 2
# Benchmarks for `make bench` to run: all of them, or some.
ONLY ?= dpo sample scaling
# More flags for `make demo`, such as ARGS="--set seed=7", or for `make bench`,
# such as ONLY=dpo ARGS="--mix even --skip-peer", or for `make scale`.
ARGS ?=

# Where there is llama.cpp, built for this machine, beside the other peers.
BENCH_REQUIREMENTS := tests/python/requirements-bench.txt
BENCH_STAMP := .venv/.bench-$(shell cat $(BENCH_REQUIREMENTS) | sha256sum | cut -c1-16)

MODEL := .cache/models/SmolLM2-135M-Instruct
REQUIREMENTS := tests/python/requirements-build.txt tests/python/requirements.txt
# The stamp's name holds the requirements' hash: other pins, another stamp.
STAMP := .venv/.installed-$(shell cat $(REQUIREMENTS) | sha256sum | cut -c1-16)
DENY_VERSION := 0.20.2
DENY := .cache/tools/cargo-deny-$(DENY_VERSION)/bin/cargo-deny

.PHONY: help setup system libtorch build cuda demo bench scale study chaos fuzz images test test-cuda test-hosts test-slurm test-compose check lint deny clean

help: ## list these targets
	@echo "usage: make TARGET"
	sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

# Libtorch alone: REQUIREMENTS=tests/python/requirements-build.txt leaves the peers out.
libtorch: system $(STAMP)

setup: system $(STAMP) ## install libtorch, the pinned peers and the demo model here
	@.venv/bin/python configs/demo/export_model.py $(MODEL)

# What pip and cargo take for granted. On Debian as root it is installed when
# missing; anybody else is told what to install.
system:
	@missing=()
	command -v cc >/dev/null && command -v c++ >/dev/null || missing+=(g++)
	command -v $(PYTHON) >/dev/null || missing+=(python3)
	[ -e .venv/bin/python ] || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
	if [ $${#missing[@]} -gt 0 ]; then
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
			echo "setup: installing $${missing[*]}"
			apt-get update -qq
			DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null
		else
			echo "error: this machine lacks $${missing[*]} (Debian's names); install them and run \`make setup\` again" >&2
			exit 1
		fi
	fi
	if ! command -v cargo >/dev/null; then
		echo "error: cargo is missing; install Rust 1.95 from https://rustup.rs" >&2
		exit 1
	fi

# .installing says that an earlier attempt was cut short: pip may then take a
# half-written package for a whole one, so all are written again (from pip's cache).
$(STAMP):
	@if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
		$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("error: Python %d.%d: the pinned torch needs 3.11, 3.12 or 3.13; run `make setup PYTHON=python3.12`" % v)'
		$(PYTHON) -m venv --clear .venv
	fi
	again=""; [ ! -e .venv/.installing ] || again=--force-reinstall
	quiet=""; [ -t 1 ] || quiet=--quiet
	echo "setup: installing $$(grep -c == $(REQUIREMENTS) | awk -F: '{n += $$2} END {print n}') pinned Python packages into .venv (4.7 GB on disk)"
	touch .venv/.installing
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps $$quiet $$again $(REQUIREMENTS:%=-r %)
	site=$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	ln -sfn "$$(realpath --relative-to=.venv "$$site/torch")" .venv/libtorch
	rm -f .venv/.installed-* .venv/.installing
	touch $@

# The wheels on the index are of old processors: built here, it uses all that this one has.
$(BENCH_STAMP): | $(STAMP)
	@echo "bench: building llama.cpp, once; this takes minutes"
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" nice .venv/bin/python -m pip install --disable-pip-version-check --no-deps \
		--quiet --no-binary llama-cpp-python -r $(BENCH_REQUIREMENTS)
	rm -f .venv/.bench-*
	touch $@

build: setup ## compile coordinator and worker
	@cargo build --release --locked

# It takes the CPU build's place in target/release; `make build` puts that back.
cuda: setup ## compile both with NCCL and CUDA, for machines with GPUs
	@cargo build --release --locked --features cuda

demo: build ## train the demo model for two iterations, on this machine's CPU
	@target/release/coordinator --workers $(WORKERS) $(ARGS)

bench: build $(if $(filter sample,$(ONLY)),$(BENCH_STAMP)) ## measure the engines beside TRL, transformers and llama.cpp, and two workers beside one
	@for benchmark in $(ONLY); do
		target/release/bench $$benchmark $(ARGS)
	done

scale: build ## measure the coordinator beside up to 1,024 simulated workers and a million prompts
	@target/release/scale $(ARGS)

study: build ## compare DRIFT, IterDPO and SPIN on a task that a program can check
	@target/release/study $(ARGS)

# How many runs `make chaos` disturbs, and the first one's seed.
SEEDS ?= 100
FIRST_SEED ?= 0

chaos: build ## kill and stop processes of small runs, SEEDS=100 times, and compare bytes
	@target/release/chaos --seeds $(SEEDS) --first-seed $(FIRST_SEED) $(ARGS)

# Seconds of it for each target, and which; all of them without.
SECONDS_EACH ?= 600
TARGETS ?=

fuzz: build ## feed each reader damaged input, for SECONDS_EACH=600 s a target
	@target/release/fuzz --seconds $(SECONDS_EACH) $(TARGETS) $(ARGS)

# Container images to make; worker-cuda where the build has CUDA.
IMAGES ?= coordinator worker
IMAGE_TAG ?= latest
REVISION = $(shell git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)

images: build ## make the container images from what is built here
	@deploy/docker/base-image
	for image in $(IMAGES); do
		deploy/docker/lay-out target/images/roots $$image
	done
	for image in $(IMAGES); do
		docker build --quiet --file deploy/docker/Dockerfile --target $$image --tag drift-$$image:$(IMAGE_TAG) \
			--build-arg BUILDER=debian:bookworm-slim --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) \
			target/images >/dev/null
		docker image inspect --format "drift-$$image:$(IMAGE_TAG): {{.Size}} bytes" drift-$$image:$(IMAGE_TAG)
	done

# What checks the manifests, in an environment of its own.
DEPLOY_REQUIREMENTS := tests/python/requirements-deploy.txt
DEPLOY_PYTHON := .cache/tools/deploy-$(shell cat $(DEPLOY_REQUIREMENTS) | sha256sum | cut -c1-16)/bin/python

$(DEPLOY_PYTHON): | $(STAMP)
	@folder=$$(dirname $(@D))
	rm -rf .cache/tools/deploy-*
	$(PYTHON) -m venv "$$folder"
	"$$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r $(DEPLOY_REQUIREMENTS) || {
		rm -rf "$$folder"
		exit 1
	}

COMPOSE := docker compose version >/dev/null 2>&1 || type docker-compose >/dev/null 2>&1

test-compose: build ## run the demo in containers, disturb it, and compare bytes (takes a Docker engine and compose)
	@if ! docker info >/dev/null 2>&1 || ! { $(COMPOSE); }; then
		echo "test-compose: not run: it takes a Docker engine that answers, and docker compose"
		exit 0
	fi
	$(MAKE) --no-print-directory images $(DEPLOY_PYTHON)
	target/release/compose --tag $(IMAGE_TAG) --python $(DEPLOY_PYTHON) $(ARGS)

# Tests that compute for minutes. They come last, and .ci/run names a time, in seconds since
# 1970, after which a slow machine does not begin them.
LONGEST := binary(system) & test(/^(door::workers_join_by_hand|methods::every_side|run::public_dialogues)/)
LONGEST_UNTIL ?=

# Whole-system tests compute on every core: one at a time, whichever runner.
test: build ## run all tests
	@cargo test --release --locked --workspace --doc --quiet
	if cargo nextest --version >/dev/null 2>&1; then
		cargo nextest run --release --locked --workspace -E 'not ($(LONGEST))'
		if [ -n "$(LONGEST_UNTIL)" ] && [ "$$(date +%s)" -gt "$(LONGEST_UNTIL)" ]; then
			echo "test: not run, since it is too late for them: $(LONGEST)"
		else
			cargo nextest run --release --locked --workspace -E '$(LONGEST)'
		fi
	else
		cargo test --release --locked --workspace --exclude drift-tests --lib --bins
		cargo test --release --locked --package drift-tests -- --test-threads=1
	fi

# All but the GPU: what is compiled and linked, and what is said where there is none.
test-cuda: cuda ## lint and try the CUDA build, as far as a machine without GPUs goes
	@cargo clippy --release --locked --workspace --all-targets --features cuda -- -D warnings
	cargo test --release --locked --workspace --features cuda --lib --quiet -- collective:: device::
	for library in libtorch_cuda libc10_cuda libnccl; do
		path=$$(ldd target/release/worker | awk -v name=$$library 'index($$1, name ".so") == 1 {print $$3}')
		[ -e "$$path" ] || { echo "error: the worker does not find $$library" >&2; exit 1; }
		echo "cuda: the worker links $$(basename "$$path")"
	done
	if [ -e /dev/nvidiactl ]; then
		echo "cuda: this machine has GPUs; what is said without them is not tried"
	else
		! said=$$(timeout 3 target/release/worker --slot 0 --device cuda:0 2>&1)
		grep -q 'libtorch sees 0 GPUs here' <<<"$$said" || { echo "error: said without a GPU: $$said" >&2; exit 1; }
	fi
	cargo build --release --locked

# Tests that need more than a machine: ignored by `make test`, one at a time here.
define ignored
if cargo nextest --version >/dev/null 2>&1; then
	cargo nextest run --release --locked --workspace --run-ignored only --test-threads 1 -E 'test(/^$(1)::/)'
else
	cargo test --release --locked --workspace --test system -- --ignored --test-threads=1 $(1)::
fi
endef

# Fails where this user cannot make hosts.
HOSTS := [ "$$(id -u)" = 0 ] && ip netns add drift-probe && ip netns delete drift-probe

SLURM := type slurmctld slurmd sbatch munged >/dev/null 2>&1

test-hosts: build ## run over several hosts, which are network namespaces (takes root)
	@if $(HOSTS) 2>/dev/null; then
		$(call ignored,hosts)
	else
		echo "test-hosts: not run: it takes root, iproute2, and leave to make network namespaces"
	fi

test-slurm: build ## submit, cancel, requeue under a real Slurm on such hosts (takes root; installs Debian's)
	@if ! $(SLURM) && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		apt-get update -qq
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
	fi
	if $(HOSTS) 2>/dev/null && $(SLURM); then
		$(call ignored,slurm)
	else
		echo "test-slurm: not run: it takes root, network namespaces, and slurmctld, slurmd, slurm-client and munge"
	fi

check: lint deny ## format, lints, documentation, licences and advisories

lint: setup ## format, lints and documentation
	@cargo fmt --all -- --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --release --locked --workspace --no-deps

deny: $(DENY) ## who may depend on what, licences and advisories
	@$(DENY) check --hide-inclusion-graph bans licenses sources
	# The advisories live in a git repository, which an isolated machine cannot reach.
	if timeout 120 $(DENY) fetch db >/dev/null 2>&1; then
		$(DENY) check --hide-inclusion-graph advisories
	else
		echo "advisories: not run: advisory database unreachable"
	fi

$(DENY):
	@found=$$(command -v cargo-deny || true)
	if [ -n "$$found" ] && [ "$$("$$found" --version)" = "cargo-deny $(DENY_VERSION)" ]; then
		mkdir -p $(@D)
		ln -sfn "$$found" $@
	else
		echo "check: building cargo-deny $(DENY_VERSION), once"
		nice cargo install --quiet --locked --root $(@D)/.. cargo-deny --version $(DENY_VERSION)
	fi

clean: ## remove what was built and .venv; runs and models stay
	@rm -rf target .venv
