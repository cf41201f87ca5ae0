# SPDX-License-Identifier: Apache-2.0 OR MIT
# One command for each thing one does with this repository; `make` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export PATH := $(HOME)/.cargo/bin:$(PATH)
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR
export TRANSHIP_BIN := $(CARGO_TARGET_DIR)/release/tranship

SCRIPTS = $(shell git ls-files '*.sh' .ci/run fixtures/debian12/customize \
	fixtures/debian12/grub-probe fixtures/debian12/root/usr/local/sbin/guest-up)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: build ## Convert a VMware guest that is made here, then boot the result
	@fixtures/demo.sh

.PHONY: test
test: build fixtures ## Run all tests, from unit tests to booted guests
	@tests/run.sh

.PHONY: check
check: setup-check ## Formatting, lints, documentation, layers, shell scripts
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps
	cargo test --package tranship-tests --test layers
	shellcheck --external-sources $(SCRIPTS)

.PHONY: bench
bench: build fixtures bench-image ## Measure against virt-v2v, libguestfs and qemu-img; tables in target/bench
	@tests/setup.sh bench
	@tests/bench/run.sh

.PHONY: bench-image
bench-image: build ## Measure `tranship image` against qemu-img alone; takes 20 GiB of disk
	@tests/setup.sh bench
	@tests/bench/image/run.sh

.PHONY: bench-nbd
bench-nbd: build ## Measure `tranship serve` and `copy` beside qemu-nbd, nbdkit and nbdcopy
	@tests/setup.sh bench
	@tests/bench/nbd/run.sh
	@tests/bench/nbd/copy.sh

.PHONY: bench-appliance
bench-appliance: build ## Measure the appliance beside guestfish, and our monitor beside QEMU in a nested machine
	@tests/setup.sh bench
	@tests/bench/appliance/run.sh

.PHONY: fuzz
fuzz: setup ## Hostile input for the parsers, FUZZ_SECONDS long (default 300)
	@tests/setup.sh fuzz
	@tests/fuzz.sh

.PHONY: nested
nested: setup build ## Run the KVM probe and our own monitor in a nested machine with real (emulated) SVM
	@TRANSHIP_TEST_FIXTURES=$$(fixtures/debian12.sh) tests/nested/all.sh

.PHONY: nested-long
nested-long: setup build ## The same with hundreds of disks and with other kernels: a quarter of an hour
	@ALL=1 tests/nested/machine.sh
	@tests/nested/disks.sh 100 256
	@tests/nested/kernels.sh || [ $$? = 77 ]

.PHONY: setup
setup: ## Install what building and testing need (apt; no-op if it is there)
	@tests/setup.sh test

.PHONY: setup-check
setup-check:
	@tests/setup.sh check

.PHONY: build
build: setup ## Build the release binary
	cargo build --release

.PHONY: fixtures
fixtures: setup ## Build the guests and disks that tests convert (cached)
	@fixtures/debian12.sh
	@fixtures/noos.sh

.PHONY: control
control: fixtures ## Show that the fixture boots on VMware's controller and not on virtio
	@fixtures/control.sh

.PHONY: clean
clean: ## Remove build results; cached fixtures stay
	rm -rf -- "$(CARGO_TARGET_DIR)"
