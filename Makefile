# The entry points for people. Each target installs what it needs and says so; `make` alone lists them.

# Where cargo puts what it builds; the environment decides, as it does for cargo itself.
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
CACHE := .cache
# cargo-deny and cargo-fuzz go here, so that nothing of the user's own is touched.
TOOLS := $(abspath $(CACHE)/tools)
# How long `make fuzz` spends on each target, and on which; on all of them by default.
SECONDS := 60
TARGET :=

.PHONY: help
help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

.PHONY: demo
demo: deps-demo ## Import a real Debian image and boot a disk made from it
	cargo build --locked --workspace --bins
	$(TARGET_DIR)/debug/demo

# Many tests wait for other programs, so that there may be more of them at a time than cores.
.PHONY: test
test: export RUST_TEST_THREADS ?= $(shell echo $$((2 * $$(nproc))))
test: deps-test tools ## Run all tests, end to end ones included
	cargo build --locked --workspace --bins
	cargo test --locked --workspace --no-fail-fast

.PHONY: lint
lint: deps-lint $(TOOLS)/bin/cargo-deny ## Check format, lints, scripts, licenses and banned crates
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	shellcheck .ci/run fixtures/*.sh tools/*.sh
	$(TOOLS)/bin/cargo-deny --locked check --hide-inclusion-graph bans licenses sources

.PHONY: bench
bench: bench-registry bench-converter ## Measure beside the peers: both of the following

.PHONY: bench-registry
bench-registry: deps-test tools ## Measure the registry beside CNCF distribution and Debian's docker-registry
	cargo build --locked --release -p dvcr -p dvcr-benches
	$(TARGET_DIR)/release/dvcr-benches --dvcr $(TARGET_DIR)/release/dvcr registry

.PHONY: bench-registry-bucket
bench-registry-bucket: deps-test tools ## Measure the registry in a bucket of MinIO beside CNCF distribution; takes an hour
	cargo build --locked --release -p dvcr -p dvcr-benches
	$(TARGET_DIR)/release/dvcr-benches --dvcr $(TARGET_DIR)/release/dvcr registry-bucket

.PHONY: bench-registry-scale
bench-registry-scale: deps-test tools ## Measure the registry on a million blobs; takes 17 GB and half an hour
	cargo build --locked --release -p dvcr -p dvcr-benches
	$(TARGET_DIR)/release/dvcr-benches --dvcr $(TARGET_DIR)/release/dvcr registry-scale

.PHONY: bench-converter
bench-converter: deps-test ## Measure the converter beside qemu-img, version 10 where Debian's can be had
	tools/qemu10.sh || true
	cargo build --locked --release -p dvcr -p dvcr-benches
	$(TARGET_DIR)/release/dvcr-benches --dvcr $(TARGET_DIR)/release/dvcr converter

.PHONY: bench-pipeline
bench-pipeline: deps-test deps-bench tools ## Measure registry to disk and into it beside skopeo, qemu-img, nbdkit, curl; takes half an hour
	tools/qemu10.sh || true
	cargo build --locked --release -p dvcr -p dvcr-benches
	$(TARGET_DIR)/release/dvcr-benches --dvcr $(TARGET_DIR)/release/dvcr pipeline
	$(TARGET_DIR)/release/dvcr-benches --dvcr $(TARGET_DIR)/release/dvcr import
	$(TARGET_DIR)/release/dvcr-benches --dvcr $(TARGET_DIR)/release/dvcr pipeline-memory

.PHONY: fuzz
fuzz: deps-build $(TOOLS)/bin/cargo-fuzz ## Fuzz, SECONDS=60 each, TARGET=vmdk for one; then hold the finds against qemu-img
	FUZZ_TARGETS="$(TARGET)" tools/fuzz.sh $(SECONDS) $(TOOLS)/bin

.PHONY: build
build: deps-build ## Build the release binary, target/release/dvcr
	cargo build --locked --release -p dvcr

.PHONY: tools
tools: ## Build the programs that tests need (clients, registries, S3 servers, OCI conformance)
	@tools/deps.sh tools
	@tools/build.sh

.PHONY: deps
deps: ## Install the Debian packages that building, the demo and the tests need
	@tools/deps.sh build demo test lint tools

.PHONY: deps-build deps-demo deps-test deps-lint deps-bench
deps-build:
	@tools/deps.sh build
deps-demo:
	@tools/deps.sh build demo
deps-test:
	@tools/deps.sh build demo test
deps-lint:
	@tools/deps.sh build lint
deps-bench:
	@tools/deps.sh build bench

.PHONY: clean
clean: ## Remove all that was built, fetched or cached
	cargo clean
	rm -rf $(CACHE)

$(TOOLS)/bin/cargo-%:
	cargo install --locked --root $(TOOLS) cargo-$*
