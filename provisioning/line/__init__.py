"""A line of boards: whose unit is on which port, what becomes of it, what the operator sees (docs/line.md)."""
