"""The station's side of one enrollment on one opened port (docs/serial-protocol.md sections 3, 4, 6 and 8).

Sans-I/O: `Enrolment.run` yields effects (`Send`, `Read`, and `Reached`, `Stored` for whoever watches) and is
given the bytes that arrived. What must be durable, and what the CA signs, goes through the `Journal` that it is
given: each of its calls returns only when the transition is on disk.

Rules:

- HELLO first; then the journal's table decides (`journal.decide`), and nothing else does. A run that follows
  a crash, on either side, is not a special case.
- Each state is durable before the next action on the wire or at the CA.
- Every answer is verified before it moves the journal: the request's key and name, the hashes, and the
  signatures over fresh nonces. A wrong one refuses the unit and leaves its row where it is.
- A private scalar exists only between its making and the verified KEYGEN answer; it is in no log, no repr, no
  error and no file. It goes over a local port only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from birthmark.device.errors import EnrollmentRefusedError
from birthmark.device.link import messages, timers
from birthmark.device.link.frame import LINK_VERSION
from birthmark.device.link.messages import ErrorCode, MessageType
from birthmark.device.link.transcript import Label, transcript, verify
from birthmark.provisioning.enrollment.exchange import DeviceRefusalError, MalformedAnswerError, Read, Send
from birthmark.provisioning.enrollment.journal import REPLACEABLE, Action, Decision, Wish, decide
from birthmark.provisioning.enrollment.signing_request import requested_key
from birthmark.provisioning.enrollment.transfer import Transfer
from birthmark.provisioning.registry.model import KeyMode, State

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from birthmark.device.link.messages import HelloAnswer
    from birthmark.provisioning.enrollment.exchange import Line
    from birthmark.provisioning.enrollment.journal import Journal
    from birthmark.provisioning.registry.model import Row

    Choice = Callable[[HelloAnswer, Row | None], Wish]
    Confirm = Callable[[HelloAnswer, Row], None]

NONCE_BYTES: Final = 16
SCALAR_BYTES: Final = 32


class Step(StrEnum):
    """A request whose answer has arrived and was found good."""

    HELLO = "hello"
    UNLOCK = "unlock"
    KEYGEN = "keygen"
    BEGIN = "begin"
    DATA = "data"
    PREPARE = "prepare"
    COMMIT = "commit"
    ATTEST = "attest"


@dataclass(frozen=True, slots=True)
class Reached:
    """For whoever watches: the answer to this step is good. Nothing to do."""

    step: Step
    hello: HelloAnswer
    """What the device said of itself."""


@dataclass(frozen=True, slots=True)
class Stored:
    """For whoever watches: this row is durable. Nothing to do."""

    row: Row


Effect = Send | Read | Reached | Stored


class UnitRefusedError(EnrollmentRefusedError):
    """The table refuses the unit; nothing was sent to it after HELLO."""

    def __init__(self, action: Action, device_id: str, reason: str, *, is_revoked: bool = False) -> None:
        self.action = action
        super().__init__(
            f"could not enrol {device_id}: {action.name}, the device on this port {reason}",
            hint=_REVOKED_HINT if action is Action.DUPLICATE and is_revoked else _HINTS[action],
        )


class ProofError(EnrollmentRefusedError):
    """The device did not prove what it should; the row stays where it is."""

    def __init__(self, step: Step, cause: str) -> None:
        self.step = step
        super().__init__(
            f"could not enrol the device: its answer to {step.name} proves nothing: {cause}",
            hint="do not release this unit; see `birthmark list` for where it stopped",
        )


_HINTS: Final = {
    Action.QUARANTINE: "put the device aside: a restored backup, a clone or a foreign station; a person decides,"
    " see `birthmark quarantine list`",
    Action.ERASED: "put the device aside: a supervisor may have it made again with `birthmark reflash`",
    Action.DUPLICATE: "nothing is wrong with it: take the next device; `birthmark reflash` would make it again",
    Action.MISMATCH: "check which board is on the port, and the id: `birthmark list` shows who is who",
}


_REVOKED_HINT: Final = (
    "put the device aside: no gateway lets it in; a supervisor may have it made again with `birthmark reflash`"
)


class _KeyLostError(Exception):
    """The device no longer has the key that the journal knows; never leaves this module."""


class Enrolment:
    """One enrollment on one opened port.

    Args:
        line: the port's session.
        journal: the registry and the CA.
        wish: what the operator asked for; or what says so once the unit is known, and may refuse it
            (EnrollmentRefusedError).
        random_bytes: a cryptographic source of nonces.
        is_local: whether the port is a local one; a private scalar goes over no other.
        confirm: called before COMMIT, with the device's word and its row; may refuse (EnrollmentRefusedError).
    """

    def __init__(
        self,
        line: Line,
        journal: Journal,
        wish: Wish | Choice,
        *,
        random_bytes: Callable[[int], bytes],
        is_local: bool,
        confirm: Confirm | None = None,
    ) -> None:
        self._line = line
        self._journal = journal
        self._choice = wish
        self._confirm = confirm
        self._random_bytes = random_bytes
        self._is_local = is_local
        self._hello: HelloAnswer
        self._wish: Wish

    def run(self) -> Generator[Effect, bytes, Row]:
        """Bring the unit to ATTESTED and return its row.

        Raises:
            UnitRefusedError: the journal's table refuses it.
            EnrollmentRefusedError: it broke the protocol, proved nothing, or said no.
            LinkError: it did not answer.
            RegistryError, AuthorityError: the station could not do its part.
        """
        self._hello = yield from self._say_hello()
        yield self._reached(Step.HELLO)
        row, replaced = self._journal.standing(self._hello.hwid)
        self._wish = self._choice if isinstance(self._choice, Wish) else self._choice(self._hello, row)
        decision = self._decide(row, replaced)
        if row is not None and self._wish.replaces_reason and decision.action in REPLACEABLE:
            row = self._journal.replace(row, decision.action, self._wish)
            yield Stored(row)
            decision = self._decide(*self._journal.standing(self._hello.hwid))
        if decision.action.refuses:
            is_revoked = row is not None and row.is_revoked
            raise UnitRefusedError(
                decision.action, self._wish.device_id.text, decision.reason, is_revoked=is_revoked
            )
        if row is None and self._wish.replaces_reason:
            raise EnrollmentRefusedError(
                f"could not make {self._wish.device_id} again: the device on this port was never made here",
                hint="nothing was reserved; `birthmark flash` makes it",
            )
        if decision.action in (Action.RESERVE, Action.KEYGEN):
            self._check_mode(self._wish.mode_for(row))
        if row is None:
            row = self._journal.reserve(self._hello.hwid, self._wish)
            yield Stored(row)
        if decision.action.asks_for_key:
            row = yield from self._certified(row, decision)
            row = yield from self._delivered(row)
        if decision.action is Action.CONFIRM:
            row = yield from self._advanced(row, State.COMMITTED)
        return (yield from self._attested(row))

    def _decide(self, row: Row | None, replaced: Row | None) -> Decision:
        """Ask the table; a unit that it sends to quarantine stays there until a person clears it."""
        held = self._journal.quarantined(self._hello.hwid)
        if held is not None:
            return Decision(Action.QUARANTINE, reason=f"is in quarantine: it {held.reason}")
        decision = decide(row, self._hello, self._wish, replaced)
        if decision.action is Action.QUARANTINE:
            self._journal.quarantine(self._hello, row.name if row is not None else "", decision.reason)
        return decision

    def _say_hello(self) -> Generator[Send | Read, bytes, HelloAnswer]:
        nonce = self._random_bytes(NONCE_BYTES)
        hello = yield from self._line.ask(
            messages.HelloRequest(nonce, LINK_VERSION, LINK_VERSION), messages.HelloAnswer
        )
        if hello.nonce != nonce:
            raise MalformedAnswerError(MessageType.HELLO, "it answers another nonce")
        return hello

    def _check_mode(self, mode: KeyMode) -> None:
        wire = messages.KeyMode.STATION if mode is KeyMode.STATION else messages.KeyMode.ON_DEVICE
        if not self._hello.key_modes & wire:
            other = KeyMode.ON_DEVICE if mode is KeyMode.STATION else KeyMode.STATION
            raise EnrollmentRefusedError(
                f"could not enrol {self._wish.device_id}: the device does not offer the key mode {mode}",
                hint=f"nothing was reserved; use --keys {other}",
            )
        if mode is KeyMode.STATION and not self._is_local:
            raise EnrollmentRefusedError(
                f"could not enrol {self._wish.device_id}: a private key does not go over a network port",
                hint="use --keys on-device, or a local serial port",
            )

    def _certified(self, row: Row, decision: Decision) -> Generator[Effect, bytes, Row]:
        """Bring a row to ISSUED or beyond, for the key that the device holds now."""
        if decision.fresh_txn:
            row = yield from self._restarted(row, "the other key mode was asked for")
        if decision.unlock:
            yield from self._unlocked(row)
        try:
            return (yield from self._with_key(row, supersede=decision.supersede))
        except _KeyLostError:
            self._check_mode(self._wish.mode_for(row))
            row = yield from self._restarted(row, "the device lost the key that was certified")
        if decision.unlock:
            yield from self._unlocked(row)
        return (yield from self._with_key(row, supersede=True))

    def _restarted(self, row: Row, reason: str) -> Generator[Effect, bytes, Row]:
        row = self._journal.restart(row, reason, self._wish.mode_for(row))
        yield Stored(row)
        return row

    def _with_key(self, row: Row, *, supersede: bool) -> Generator[Effect, bytes, Row]:
        fresh = not row.state.reached(State.KEYED)
        mode = self._wish.mode_for(row)
        made = ec.generate_private_key(ec.SECP256R1()) if fresh and mode is KeyMode.STATION else None
        public_key_der = yield from self._requested(row, made, supersede=supersede)
        del made
        yield self._reached(Step.KEYGEN)
        if fresh:
            row = self._journal.key(row, public_key_der)
            yield Stored(row)
        elif public_key_der != row.public_key_der:
            raise _KeyLostError
        if row.state is State.KEYED:
            row = self._journal.issue(row)
            yield Stored(row)
        return row

    def _requested(
        self, row: Row, made: ec.EllipticCurvePrivateKey | None, *, supersede: bool
    ) -> Generator[Send | Read, bytes, bytes]:
        """Send KEYGEN and return the verified request's public key."""
        scalar = made.private_numbers().private_value.to_bytes(SCALAR_BYTES, "big") if made else None
        request = messages.KeygenRequest(_txn(row), scalar, supersede)
        del scalar
        try:
            answer = yield from self._line.ask(request, messages.KeygenAnswer)
        except DeviceRefusalError as error:
            if error.code == ErrorCode.MODE and row.state.reached(State.KEYED):
                # Without a pending key, a device that makes none of its own has no other answer.
                raise _KeyLostError from None
            raise
        public_key_der = requested_key(answer.csr_der, self._hello.hwid.hex())
        if made is not None and public_key_der != _spki(made.public_key()):
            raise ProofError(Step.KEYGEN, "the request is for another key than the one it was given")
        return public_key_der

    def _delivered(self, row: Row) -> Generator[Effect, bytes, Row]:
        """Bring a row from ISSUED or PREPARED to COMMITTED."""
        bundle = row.bundle or b""
        if len(bundle) > self._hello.max_bundle_bytes:
            raise EnrollmentRefusedError(
                f"could not enrol {row.name}: the device takes bundles of {self._hello.max_bundle_bytes} bytes,"
                f" this one has {len(bundle)}",
                hint="the certificate is not released; use a shorter chain, or update the firmware",
            )
        nonce, answer = yield from self._prepared(row, bundle)
        self._check_hashes(Step.PREPARE, row, answer)
        self._check_signature(Step.PREPARE, Label.PREPARE, row, nonce, answer.signature)
        yield self._reached(Step.PREPARE)
        row = yield from self._advanced(row, State.PREPARED)
        if self._confirm is not None:
            self._confirm(self._hello, row)
        yield from self._line.ask(
            messages.CommitRequest(_txn(row), row.bundle_sha256 or b""), messages.CommitAnswer
        )
        yield self._reached(Step.COMMIT)
        return (yield from self._advanced(row, State.COMMITTED))

    def _prepared(self, row: Row, bundle: bytes) -> Generator[Effect, bytes, tuple[bytes, messages.PrepareAnswer]]:
        """Transfer the bundle and send PREPARE, again if the device loses the transfer."""
        begins = 0
        while True:
            begins += 1
            try:
                yield from self._transferred(row, bundle)
                nonce = self._random_bytes(NONCE_BYTES)
                answer = yield from self._line.ask(
                    messages.PrepareRequest(_txn(row), nonce), messages.PrepareAnswer
                )
            except DeviceRefusalError as error:
                lost = error.request is not MessageType.BEGIN and error.code in (ErrorCode.STATE, ErrorCode.SHA)
                if not lost or begins >= timers.BEGINS:
                    raise
            else:
                return nonce, answer

    def _transferred(self, row: Row, bundle: bytes) -> Generator[Effect, bytes, None]:
        begin = messages.BeginRequest(_txn(row), len(bundle), row.bundle_sha256 or b"")
        wanted = yield from self._line.ask(begin, messages.OffsetAnswer)
        if wanted.offset > len(bundle):
            raise MalformedAnswerError(MessageType.BEGIN, "it wants an offset past the end of the bundle")
        yield self._reached(Step.BEGIN)
        yield from Transfer(self._line, bundle, wanted.offset, self._hello.max_frame_bytes).run()
        yield self._reached(Step.DATA)

    def _attested(self, row: Row) -> Generator[Effect, bytes, Row]:
        nonce = self._random_bytes(NONCE_BYTES)
        answer = yield from self._line.ask(messages.AttestRequest(nonce), messages.AttestAnswer)
        if answer.txn != row.txn:
            raise ProofError(Step.ATTEST, "it attests another transaction")
        self._check_hashes(Step.ATTEST, row, answer)
        self._check_signature(Step.ATTEST, Label.ATTEST, row, nonce, answer.signature)
        yield self._reached(Step.ATTEST)
        return (yield from self._advanced(row, State.ATTESTED))

    def _unlocked(self, row: Row) -> Generator[Effect, bytes, None]:
        """Open the lock of the row that this one replaces; a reboot in between loses the nonce."""
        tries = 0
        while True:
            tries += 1
            challenge = yield from self._line.ask(
                messages.UnlockChallengeRequest(_txn(row)), messages.UnlockChallengeAnswer
            )
            old_txn = self._hello.active_txn
            if challenge.old_txn != old_txn:
                raise MalformedAnswerError(MessageType.UNLOCK, "it is locked by another transaction than it said")
            signed = transcript(Label.UNLOCK, challenge.nonce, self._hello.hwid, old_txn, _txn(row))
            signer_sha256, signature = self._journal.sign_unlock(row, old_txn, signed)
            proof = messages.UnlockProofRequest(_txn(row), signer_sha256, signature)
            try:
                answer = yield from self._line.ask(proof, messages.UnlockProofAnswer)
            except DeviceRefusalError as error:
                if error.code != ErrorCode.AUTH or tries >= timers.UNLOCK_TRIES:
                    raise
                continue
            if answer.new_txn != row.txn:
                raise MalformedAnswerError(MessageType.UNLOCK, "it unlocked another transaction")
            yield self._reached(Step.UNLOCK)
            return

    def _advanced(self, row: Row, state: State) -> Generator[Effect, bytes, Row]:
        if not row.state.reached(state):
            row = self._journal.advance(row, state)
            yield Stored(row)
        return row

    def _check_hashes(self, step: Step, row: Row, answer: messages.PrepareAnswer | messages.AttestAnswer) -> None:
        if answer.leaf_sha256 != hashlib.sha256(row.certificate_der or b"").digest():
            raise ProofError(step, "it holds another certificate")
        if answer.bundle_sha256 != row.bundle_sha256:
            raise ProofError(step, "it holds another bundle")

    def _check_signature(self, step: Step, label: Label, row: Row, nonce: bytes, signature: bytes) -> None:
        certificate_der = row.certificate_der or b""
        leaf_sha256 = hashlib.sha256(certificate_der).digest()
        bundle_sha256 = row.bundle_sha256 or b""
        signed = transcript(label, nonce, self._hello.hwid, _txn(row), leaf_sha256, bundle_sha256)
        key = x509.load_der_x509_certificate(certificate_der).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not verify(key, signature, signed):
            raise ProofError(step, "its signature does not verify")

    def _reached(self, step: Step) -> Reached:
        return Reached(step, self._hello)


def _txn(row: Row) -> bytes:
    return row.txn or b""


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
