"""What the repository's text must not hold: paths of one machine, addresses of a package index, keys."""

from __future__ import annotations

import re

import pytest
from support.repository import ROOT, tracked

# In brackets here and there, so that this file does not hold what it forbids.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(w[o]rk|r[o]ot|h[o]me/[a-z]|U[s]ers/[A-Za-z])[/\w]",
    "the address of a package index": (
        r"(?i)--(extra-)?index-[u]rl|index-[u]rl\s*=|PIP_[A-Z_]*IND[E]X|https?://[^\s)\"'>]*/simpl[e]\b"
        r"|find-link[s]|https?://(files\.)?p[y]pi"
    ),
}


def texts() -> dict[str, str]:
    found = {}
    for path in tracked():
        try:
            found[path] = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_text_names_no_machine_and_no_index(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "cd /w" + "ork/main",
        'open("/ro' + 'ot/x")',
        "/ho" + "me/ann/x",
        "pip install --index" + "-url https://example.org",
        "https://example.org/simp" + "le/",
        "PIP_INDE" + "X_URL=x",
    ],
)
def test_the_patterns_find_what_they_are_for(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in FORBIDDEN.values())


def test_no_private_key_is_tracked() -> None:
    # The golden vectors hold test scalars, named as such; a PEM key has no business in the repository.
    pattern = re.compile(r"^-----BEGIN (EC |RSA |ENCRYPTED )?PRIVATE KEY-----$", re.MULTILINE)
    assert [path for path, text in texts().items() if pattern.search(text)] == []
