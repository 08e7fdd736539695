"""A private key that stays in a token, as `cryptography` takes it: its `sign` goes there.

`cryptography`'s builders sign certificates and CRLs with any `EllipticCurvePrivateKey`, by its `sign`. So what
signs at this station does not know where the key is.

Rule: a key counts as the certificate's once it has signed a challenge that verifies under the public key; not by
its name, which anybody can give it.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, Hash

from birthmark.device.errors import AuthorityError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.asymmetric.ec import (
        ECDH,
        EllipticCurvePrivateNumbers,
        EllipticCurvePublicKey,
        EllipticCurveSignatureAlgorithm,
    )
    from cryptography.hazmat.primitives.serialization import Encoding, KeySerializationEncryption, PrivateFormat
    from cryptography.utils import Buffer

    from birthmark.provisioning.tokens.uri import TokenUri

_HALF_OCTETS = 32


class TokenKey(EllipticCurvePrivateKey):
    """A P-256 key in a token. It signs SHA-256 digests, and does nothing else.

    Args:
        uri: which; for errors.
        public_key: its public half.
        sign_digest: has the token sign a digest; returns r and s, 32 octets each.
    """

    def __init__(
        self, uri: TokenUri, public_key: EllipticCurvePublicKey, sign_digest: Callable[[bytes], bytes]
    ) -> None:
        self.uri = uri
        self._public_key = public_key
        self._sign_digest = sign_digest

    def __repr__(self) -> str:
        return f"TokenKey({self.uri})"

    def sign(self, data: Buffer, signature_algorithm: EllipticCurveSignatureAlgorithm) -> bytes:
        """Sign data by ECDSA with SHA-256; return the signature (DER).

        Raises:
            AuthorityError: the token cannot.
        """
        if not isinstance(signature_algorithm, ECDSA) or not isinstance(signature_algorithm.algorithm, SHA256):
            raise TypeError("a key in a token signs with ECDSA and SHA-256 only")
        digest = Hash(SHA256())
        digest.update(data)
        raw = self._sign_digest(digest.finalize())
        if len(raw) != 2 * _HALF_OCTETS:
            raise AuthorityError(
                f"could not sign with the key {self.uri}: the token answered with {len(raw)} bytes, not 64",
                hint="this token does not sign as PKCS#11 says: use another one",
            )
        r, s = (int.from_bytes(half, "big") for half in (raw[:_HALF_OCTETS], raw[_HALF_OCTETS:]))
        return encode_dss_signature(r, s)

    def prove(self) -> None:
        """Have the token sign a challenge, and check it.

        Raises:
            AuthorityError: the token cannot, or the key is another one.
        """
        challenge = secrets.token_bytes(32)
        try:
            self._public_key.verify(self.sign(challenge, ECDSA(SHA256())), challenge, ECDSA(SHA256()))
        except InvalidSignature as error:
            raise AuthorityError(
                f"could not use the key {self.uri}: its signatures are another key's",
                hint="is it the right token? It has another key under that name",
            ) from error

    def public_key(self) -> EllipticCurvePublicKey:
        """Return the public half."""
        return self._public_key

    @property
    def curve(self) -> SECP256R1:
        """P-256."""
        return SECP256R1()

    @property
    def key_size(self) -> int:
        """In bits."""
        return self.curve.key_size

    def exchange(self, algorithm: ECDH, peer_public_key: EllipticCurvePublicKey) -> NoReturn:  # noqa: ARG002
        """Refuse: a CA's key signs."""
        raise self._stays()

    def private_numbers(self) -> EllipticCurvePrivateNumbers:
        """Refuse: the key stays in its token."""
        raise self._stays()

    def private_bytes(
        self,
        encoding: Encoding,  # noqa: ARG002
        format: PrivateFormat,  # noqa: A002, ARG002
        encryption_algorithm: KeySerializationEncryption,  # noqa: ARG002
    ) -> bytes:
        """Refuse: the key stays in its token."""
        raise self._stays()

    def __copy__(self) -> TokenKey:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> TokenKey:
        return self

    def _stays(self) -> AuthorityError:
        return AuthorityError(f"could not use the key {self.uri} for that: it stays in its token, and signs only")
