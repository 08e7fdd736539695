"""The station's side of an enrollment over a serial port, in two phases, on record (docs/serial-protocol.md)."""
