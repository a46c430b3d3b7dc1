# agent: the program that answers in the guest and in the lab host. Static, so that it needs nothing of either.

make_agent() {
    local work=$2 target; target=$(dirname "$images")
    RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --release --manifest-path "$here/agent/Cargo.toml" \
        --target x86_64-unknown-linux-gnu --target-dir "$target" >&2 ||
        fail "the agent could not be built (cargo's message is above): correct $here/agent, then run this again"
    cp "$target/x86_64-unknown-linux-gnu/release/agent" "$work/agent"
}
