"""A made device's label: its id as a QR code and in letters, and what else goes on it.

Rules (docs/serial-protocol.md section 8, "Release"):

- Only a unit that is ATTESTED, and whose certificate is not revoked, gets a label.
- The code holds the id and nothing else: what `birthmark run --scan` reads.
- SVG is the whole label, 50 mm by 25 mm; PNG is the code alone, for a label printer that sets its own text.
"""

from __future__ import annotations

import html
import io
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import EnrollmentRefusedError, RegistryError
from birthmark.device.escape import escaped
from birthmark.provisioning.registry.model import Kind, State

if TYPE_CHECKING:
    from birthmark.provisioning.registry.interface import Registry
    from birthmark.provisioning.registry.model import Row

WIDTH_MM: Final = 50.0
HEIGHT_MM: Final = 25.0
MARGIN_MM: Final = 2.0
PNG_SCALE: Final = 8
"""Dots for a module of the code."""
_QUIET_MODULES: Final = 4
"""The empty border that ISO/IEC 18004 asks for."""
_MAX_LINES: Final = 6
_ID_MM: Final = 3.2
_TEXT_MM: Final = 2.2
_LETTER_WIDTH: Final = 0.6
"""Of a letter's height, in a monospaced face."""


class Format(StrEnum):
    """What a label is written as."""

    SVG = "svg"
    PNG = "png"


def made(registry: Registry, name: str) -> Row:
    """Return the row of a made unit.

    Raises:
        RegistryError: there is no such device.
        EnrollmentRefusedError: it is not made, or its certificate is revoked.
    """
    with registry.view() as view:
        row = view.live_by_name(name)
        ever = view.named(name)
    if row is None or row.kind is not Kind.DEVICE:
        if ever and row is None:
            raise EnrollmentRefusedError(
                f"could not make a label for {ever[-1].name}: it is {ever[-1].state} ({ever[-1].void_reason})",
                hint="only what is ATTESTED is made",
            )
        raise RegistryError(
            f"could not make a label for {escaped(name, 64)}: there is no such device",
            hint="list them with `birthmark list --kind device`",
        )
    if row.state is not State.ATTESTED:
        raise EnrollmentRefusedError(
            f"could not make a label for {row.name}: it is {row.state}, not ATTESTED",
            hint="finish it first: `birthmark resume`",
        )
    if row.is_revoked:
        raise EnrollmentRefusedError(
            f"could not make a label for {row.name}: its certificate is revoked ({row.revocation_reason})",
            hint="`birthmark reflash` makes it again",
        )
    return row


def label(row: Row, form: Format) -> bytes:
    """Return a made unit's label as a file's content."""
    import segno  # noqa: PLC0415 - a twentieth of a second that the other commands need not wait for

    code = segno.make(row.name, error="m", micro=False)
    if form is Format.PNG:
        content = io.BytesIO()
        code.save(content, kind="png", scale=PNG_SCALE, border=_QUIET_MODULES)
        return content.getvalue()
    return _svg(row, [[bool(module) for module in line] for line in code.matrix])


def _svg(row: Row, modules: list[list[bool]]) -> bytes:
    side_mm = HEIGHT_MM - 2 * MARGIN_MM
    module_mm = side_mm / (len(modules) + 2 * _QUIET_MODULES)
    path = "".join(
        f"M{x} {y}h1v1h-1z" for y, line in enumerate(modules) for x, is_dark in enumerate(line) if is_dark
    )
    begin_mm = MARGIN_MM + _QUIET_MODULES * module_mm
    text_mm = MARGIN_MM + side_mm + MARGIN_MM / 2
    lines = [row.role, *row.label.splitlines()][:_MAX_LINES]
    size = f'width="{WIDTH_MM:g}mm" height="{HEIGHT_MM:g}mm" viewBox="0 0 {WIDTH_MM:g} {HEIGHT_MM:g}"'
    place = f"translate({begin_mm:.4f} {begin_mm:.4f}) scale({module_mm:.5f})"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<title>{html.escape(row.name)}</title>",
        f'<rect width="{WIDTH_MM:g}" height="{HEIGHT_MM:g}" fill="#fff"/>',
        f'<path transform="{place}" d="{path}"/>',
        _text(row.name, text_mm, MARGIN_MM + _ID_MM + 1, size_mm=_ID_MM),
    ]
    for number, line in enumerate(lines):
        y_mm = MARGIN_MM + _ID_MM + 1 + (number + 1) * (_TEXT_MM + 0.6)
        parts.append(_text(line, text_mm, y_mm, size_mm=_TEXT_MM))
    return ("\n".join([*parts, "</svg>"]) + "\n").encode()


def _text(text: str, x_mm: float, y_mm: float, *, size_mm: float) -> str:
    """Return a line of text that reaches to the right margin at most, in smaller letters if need be."""
    fits_mm = (WIDTH_MM - MARGIN_MM - x_mm) / (_LETTER_WIDTH * max(len(text), 1))
    size_mm = min(size_mm, fits_mm)
    return (
        f'<text x="{x_mm:.2f}" y="{y_mm:.2f}" font-family="monospace" font-size="{size_mm:.2f}">'
        f"{html.escape(text)}</text>"
    )
