"""PKCS#11 tokens that hold the keys of CAs (docs/hsm.md)."""
