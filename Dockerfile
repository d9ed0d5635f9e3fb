# The relay as an image: one binary on a base without a shell, run by nobody in particular.
#
#   docker build --build-arg RELAY_REVISION="$(git rev-parse HEAD)" --tag cyberscan-relay .
#
# It needs nothing that only BuildKit has, so that docker-compose 1.29 builds it, too. Both bases can be replaced by
# mirrors of them; pin them by digest where images have to be reproducible.
ARG RUST_IMAGE=rust:1.95-bookworm
ARG BASE_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${RUST_IMAGE} AS build
# `otel`: the relay can send traces.
ARG RELAY_FEATURES=
WORKDIR /src
# The dependencies first, with a program that does nothing: this layer stays until Cargo.toml or Cargo.lock changes.
# Cargo insists on the files of the benches it is not going to build.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src benches \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && sed -n '/^\[\[bench\]\]/,/^name/s/^name = "\(.*\)"/\1/p' Cargo.toml > benches/names \
    && while read -r bench; do touch "benches/$bench.rs"; done < benches/names \
    && cargo build --release --locked --features "${RELAY_FEATURES}" --bin cyberscan-relay
COPY config config
COPY src src
# Shown by the metric relay_build_info. Below the dependencies: every commit changes it.
ARG RELAY_REVISION=unknown
# The sources are older than the program that does nothing, so cargo has to be told that they are new.
RUN touch src/lib.rs src/main.rs \
    && cargo build --release --locked --features "${RELAY_FEATURES}" --bin cyberscan-relay

FROM ${BASE_IMAGE}
# Of Cargo.toml; scripts/deploy/check.sh compares them.
ARG RELAY_VERSION=0.1.0
ARG RELAY_REVISION=unknown
# Where the source of what is published can be had; whoever publishes knows.
ARG RELAY_SOURCE=unknown
# The value from above the first stage.
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="cyberscan-relay" \
      org.opencontainers.image.description="A caching, rate-limited relay between Cisco SecureX/XDR and CyberScan" \
      org.opencontainers.image.version="${RELAY_VERSION}" \
      org.opencontainers.image.revision="${RELAY_REVISION}" \
      org.opencontainers.image.source="${RELAY_SOURCE}" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
COPY LICENSE /usr/share/doc/cyberscan-relay/LICENSE
COPY --from=build /src/target/release/cyberscan-relay /usr/local/bin/cyberscan-relay
# By number: Kubernetes can then tell that it is not root.
USER 65532:65532
# 9091 is the admin listener. It stays on the loopback interface unless RELAY_ADMIN_LISTEN says otherwise.
EXPOSE 9090 9091
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 CMD ["/usr/local/bin/cyberscan-relay", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/cyberscan-relay"]
