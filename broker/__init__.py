"""The gateway's broker: mutual TLS, policy by certificate, routing, revocation, receipts."""
