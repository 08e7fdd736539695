"""The station: the certificate authority, the registry, flashing over serial, and revocation."""
