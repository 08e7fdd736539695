"""The gateway as one of a fleet: its policy and CRLs from above, and devices that move (docs/fleet.md)."""
