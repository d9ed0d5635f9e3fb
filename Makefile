# Two commands for a newcomer: `make demo` and `make test`. They need Rust (rustup.rs), make and gcc; what else
# a target needs, it installs itself.

CARGO ?= cargo

.PHONY: demo test test-otel fuzz coverage models mutants bench bench-prefetch trials scale soak lint sbom doc boards deploy-check page openapi walk ci

## Run the relay with a fake CyberScan and a fake key issuer, show one investigation, serve until Ctrl-C.
demo:
	$(CARGO) run --locked --quiet -- demo

## Run all tests.
test:
	scripts/need-redis.sh
	scripts/need.sh openssl openssl
	scripts/need.sh nginx nginx-light
	scripts/need.sh caddy caddy
	scripts/need.sh haproxy haproxy
	$(CARGO) test --locked --quiet

## What the feature otel adds.
test-otel:
	scripts/need-redis.sh
	$(CARGO) test --locked --quiet --features otel --lib -- trace:: telemetry::
	$(CARGO) test --locked --quiet --features otel --test it -- otel::

## Fuzz every place where input comes in, each for a minute; `make fuzz SECONDS=5` for a look.
fuzz:
	scripts/fuzz.sh $(or $(SECONDS),60)

## Which lines tests run, into target/coverage.
coverage:
	scripts/coverage.sh

## Single flight, circuit breaker, key sets and purges under thousands of schedules: `make models SEED=7 SCHEDULES=100000`;
## `make models ONLY=name REPLAY=file` runs the one that failed again.
models:
	$(CARGO) run --locked --quiet --release --manifest-path models/Cargo.toml --target-dir $(or $(CARGO_TARGET_DIR),target)/models -- \
		$(if $(SEED),--seed $(SEED)) $(if $(SCHEDULES),--schedules $(SCHEDULES)) $(if $(REPLAY),--replay $(REPLAY)) $(ONLY)

## Lines of auth, egress, cache, limiter and flight made wrong, one at a time: do tests notice? Every eighth of some 1,200,
## an hour; `make mutants PART=3/8` others, `PART=0/1` all.
mutants:
	scripts/mutants.sh $(PART)

## What an answer costs beside warp alone, into docs/benchmarks.md; then the parts. Some minutes on a quiet machine.
## `make bench ONLY="L1 hit"` runs the cases of that name and writes nothing.
bench:
	scripts/need-redis.sh
	scripts/need.sh nginx nginx-light
	$(CARGO) bench --locked --bench load -- $(if $(ONLY),"$(ONLY)")
	$(if $(ONLY),,$(CARGO) bench --locked --bench parts)

## What fetching ahead brings and costs, simulated in virtual time, into docs/benchmarks.md.
bench-prefetch:
	$(CARGO) bench --locked --bench prefetch

## The trials under load at full length; their figures are printed.
trials:
	scripts/need-redis.sh
	RELAY_TRIAL_SECONDS=$(or $(SECONDS),30) $(CARGO) test --locked --test overload -- --nocapture

## What a fleet costs its Redis, into docs/scaling.md: ten processes, then up to 100 replicas and 100,000 tenants
## (`make scale TENANTS=1000` for less). Some twenty minutes.
scale:
	scripts/need-redis.sh
	RELAY_SCALE=1 $(if $(TENANTS),RELAY_SCALE_TENANTS=$(TENANTS)) $(CARGO) test --locked --test scale -- --nocapture

## Two relays asked steadily while something goes wrong every 20 s; what they hold must stay the same. Five minutes
## and a warm-up; `make soak SECONDS=3600` for an hour.
soak:
	scripts/need-redis.sh
	RELAY_SOAK_SECONDS=$(or $(SECONDS),300) $(CARGO) test --locked --test soak -- --nocapture

## Formatting, clippy with and without traces, and the rules for dependencies.
lint:
	$(CARGO) fmt --check
	$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	$(CARGO) fmt --check --all --manifest-path models/Cargo.toml
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --all-targets --features otel -- -D warnings
	$(CARGO) clippy --locked --manifest-path models/Cargo.toml --target-dir $(or $(CARGO_TARGET_DIR),target)/models -- -D warnings
	scripts/deny.sh

## What the binary is made of (CycloneDX, JSON), into target/sbom.
sbom:
	scripts/sbom.sh

## The documentation of the code, without a broken link.
doc:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

## Boards, rules and alerts: by themselves, then every query of the boards against a live relay.
boards:
	scripts/boards/run.sh
	$(CARGO) build --locked --quiet
	scripts/boards/live.sh

## Dockerfile, Compose, Kubernetes, systemd, as far as it goes without an engine or a cluster.
deploy-check:
	scripts/deploy/check.sh

## The status page in a real browser.
page:
	$(CARGO) build --locked --quiet
	scripts/page/check.sh

## The descriptions of both listeners (docs/openapi*.yaml) against the source and a live relay.
openapi:
	$(CARGO) build --locked --quiet
	scripts/openapi/check.sh

## The README's rehearsal, command by command: what is printed is what is shown.
walk:
	$(CARGO) build --locked --quiet
	scripts/walk/check.sh

## Everything that has to hold before a change lands.
ci: lint test test-otel models soak fuzz doc boards deploy-check page openapi walk
	$(CARGO) run --locked --quiet -- demo --once
