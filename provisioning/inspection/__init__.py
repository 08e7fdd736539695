"""Certificates, requests and CRLs held against the profile (docs/certificate-profile.md), one rule each."""
