"""Replacing a CA while everybody stays connected: an issuing CA alone, or a root with the issuing CA under it.

    start      a new CA is made; gateways get its certificate and its first CRL, so that they let in what it issues
    activate   devices and services get their certificates from it; what the old one issued stays good
    activate --brokers (a root only)
               brokers get theirs from it, too: once every device holds the new root
    retire     the old one is closed: everything under it revoked, on a last CRL; then nobody trusts it any more

Rules (docs/rollover.md):

- Each phase is refused while somebody would be cut off by it, and says who; `force` does it all the same.
- Each may be killed and run again: a key is on disk before the record of its CA, the record changes in one
  transaction, and what follows it (copies, CRLs, deliveries) is made good by the next run.
- The old root's key is not needed to replace it: there is no cross-signing. Devices get the new root inside a
  renewal's answer, vouched for by a CA under a root that they hold (`anchors`).
"""
