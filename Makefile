# What a developer runs; `make` alone lists it. Everything is made under target/, which is never committed.

# Boots per soak test, and guests or lab hosts at once: each takes a core without KVM.
ROUNDS ?= 200
THREADS ?= 2

export CARGO_TERM_COLOR ?= auto
# What fails says where without drowning the guest's own words.
export RUST_BACKTRACE ?= 0

.PHONY: help images lock build release test lab lab-shell demo bench lint record soak clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

images: ## QEMU 7.2 and 10.0, the guest, the lab and the Python client, under target/images (cached)
	@integration-images/setup

lock: ## the newest of the packages that images are made of, to integration-images/packages.lock; prints what changed
	@integration-images/lock

build: ## every crate, unoptimised
	cargo build --workspace

release: ## the qvirt program as it is shipped
	cargo build --release -p launcher

# The modules named soak have what repeats a test with another QEMU, bus or device, or at each of its steps.
test: images build ## the tests, real QEMU, guest and lab included, of each matrix a sample; the guests' inventories stand in the output
	cargo test --workspace -- --test-threads=$(THREADS) --show-output --skip soak::

lab: images build ## the tests in the hardware lab alone, two at once
	cargo test -p tests --test lab -- --test-threads=$(THREADS) --show-output --skip soak::

lab-shell: images build ## a root shell in the lab, with qvirt on the path
	@cargo run --quiet -p tests --bin lab shell

demo: images ## the main job, told step by step
	cargo build -p launcher
	@examples/demo

bench: images release ## the ratios that the goals name
	cargo bench -p tests --bench ratios --bench suspension --bench snapshots

lint: ## format, clippy and documentation, warnings being errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet
	@for script in .ci/run integration-images/setup integration-images/lock integration-images/lib/*.sh integration-images/parts/*.sh \
		integration-images/lab/init; do bash -n $$script || exit 1; done
	sh -n integration-images/lab/initramfs-init && sh -n integration-images/lab/poweroff
	sh -n integration-images/guest/init && sh -n integration-images/guest/qga

record: images ## tests/recorded/ anew, from the QEMUs under target/images
	@integration-images/record-schemas

soak: images build ## what `make test` leaves out of each matrix, the tests named soak with QVIRT_ROUNDS=$(ROUNDS) rounds, and the lab's devices ten times in a row
	QVIRT_ROUNDS=$(ROUNDS) cargo test --workspace -- --test-threads=$(THREADS) --show-output soak
	QVIRT_ROUNDS=$(ROUNDS) cargo test -p tests --test lab -- --test-threads=$(THREADS) --show-output --skip soak::

clean: ## all of target/, images too
	cargo clean
