"""What is on a port that does not answer: docs/serial-protocol.md section 10, the first rule that holds.

The evidence is what arrived while the unanswered request was out. Noise is the last 4096 bytes that were no
frame; it comes from anything that may hang on the other end of a cable, so it is shown in escaped form only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from birthmark.device.escape import escaped

SHOWN_NOISE_BYTES: Final = 120
_MIN_BAUD_NOISE_BYTES: Final = 16
_LOGIN: Final = re.compile(rb"login:|password:", re.IGNORECASE)
_PROMPT: Final = re.compile(rb"[$#>] \Z")
_BOOT: Final = re.compile(rb"waiting for download|boot:0x|Hit any key to stop autoboot")
_UNPRINTABLE: Final = re.compile(rb"[^\x20-\x7e\t\n\r\x1b]")


class Verdict(StrEnum):
    """What answered instead of a device, in the order in which the rules are tried."""

    CONSOLE = "CONSOLE"
    BOOTLOADER = "BOOTLOADER"
    ECHO = "ECHO"
    VERSION = "VERSION"
    STUCK = "STUCK"
    BAUD = "BAUD"
    NOISE = "NOISE"
    SILENT = "SILENT"

    @property
    def meaning(self) -> str:
        """What it means, in a few words."""
        return _MEANING[self]

    @property
    def hint(self) -> str:
        """What a person can do about it."""
        return _HINT[self]


_MEANING: Final = {
    Verdict.CONSOLE: "a login or a shell is on the line",
    Verdict.BOOTLOADER: "the device sits in its boot loader",
    Verdict.ECHO: "our own requests come back",
    Verdict.VERSION: "the device speaks another version of the link",
    Verdict.STUCK: "a device is there, but it does not answer this request",
    Verdict.BAUD: "unreadable bytes: another speed, or a badly damaged line",
    Verdict.NOISE: "bytes arrive, but no frames",
    Verdict.SILENT: "nothing arrives at all",
}
_HINT: Final = {
    Verdict.CONSOLE: "stop the getty on that line, or choose the port on which the enrollment agent listens",
    Verdict.BOOTLOADER: "reset the board without its boot pin held, then run the same command again",
    Verdict.ECHO: "take off the loopback plug, or start the agent: an idle terminal echoes what it is sent",
    Verdict.VERSION: "update the station or the firmware, so that both speak one version",
    Verdict.STUCK: "reset the device, then run the same command again: it resumes where it stopped",
    Verdict.BAUD: "check --baud against the firmware, then cable and ground",
    Verdict.NOISE: "check that the firmware has the enrollment agent, and that this is its port",
    Verdict.SILENT: "check the port's name, the power, and that TX and RX are crossed",
}


@dataclass(slots=True)
class Evidence:
    """What arrived while a request was out."""

    byte_count: int = 0
    noise: bytes = b""
    """The last 4096 bytes that were no frame."""
    echoes: int = 0
    """Sound request frames with our own session."""
    other_version: int | None = None
    """The link version of the last sound frame of another one."""
    sound_frames: int = 0
    """Sound frames from a device, of any session, BUSY and NAK included."""

    @property
    def shown_noise(self) -> str:
        """The end of the noise, escaped."""
        return escaped(self.noise[-SHOWN_NOISE_BYTES:])


def judge(evidence: Evidence) -> Verdict:
    """Return the first verdict whose rule holds."""
    noise = evidence.noise
    if _LOGIN.search(noise) or _PROMPT.search(noise):
        return Verdict.CONSOLE
    if _BOOT.search(noise):
        return Verdict.BOOTLOADER
    if evidence.echoes:
        return Verdict.ECHO
    if evidence.other_version is not None:
        return Verdict.VERSION
    if evidence.sound_frames:
        return Verdict.STUCK
    if len(noise) >= _MIN_BAUD_NOISE_BYTES and 3 * len(_UNPRINTABLE.findall(noise)) >= len(noise):
        return Verdict.BAUD
    return Verdict.NOISE if evidence.byte_count else Verdict.SILENT
