"""Boards that do not exist: the device's own agent and client on pseudo-terminals."""
