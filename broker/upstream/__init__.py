"""The gateway's links to brokers above it: `[[upstream]]` in `broker.toml` (docs/upstream.md)."""
