"""The registry: every identity ever issued, behind one interface."""
