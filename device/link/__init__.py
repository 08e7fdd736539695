"""The serial enrollment link: frames, messages and bundles as both ends agree (docs/serial-protocol.md)."""
