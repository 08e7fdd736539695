"""What the documentation points at is there: files, headings, tests, modules."""

from __future__ import annotations

import ast
import re

import pytest
from support.repository import ROOT, tracked

PAGES = [path for path in tracked() if path.endswith(".md")]
LINK = re.compile(r"\]\((?!https?://)([^)\s]*)\)")


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: str) -> list[str]:
    """Where a page's links lead within the repository; a grammar in backquotes is no link."""
    return LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(file.relative_to(ROOT))), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_tests_and_modules_named_exist(page: str) -> None:
    text = prose(page)
    sources = "\n".join(
        (ROOT / path).read_text(encoding="utf-8")
        for path in tracked()
        if path.startswith("tests/") and path.endswith(".py")
    )
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in sources, f"{page} names {name}"
    for path in re.findall(
        r"`((?:tests|device|broker|provisioning|firmware_sim|demo|deploy|bench)/[\w/.-]*)`", text
    ):
        assert (ROOT / path).exists(), f"{page} names {path}"


def test_every_page_is_reachable_from_the_readme() -> None:
    seen: set[str] = set()
    waiting = ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or not page.endswith(".md"):
            continue
        seen.add(page)
        targets = (link.partition("#")[0] for link in links(page))
        waiting += [
            str(((ROOT / page).parent / target).resolve().relative_to(ROOT)) for target in targets if target
        ]
    assert {page for page in PAGES if not page.startswith("docs/adr/")} <= seen


def test_the_architecture_names_every_folder_of_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w/]+)/` \|", page, re.MULTILINE))
    assert {path.removesuffix("/__init__.py") for path in tracked() if path.endswith("/__init__.py")} <= named


def actions_in(path: str) -> set[str]:
    """The words that a module gives as the action of an audit entry: the first argument of `….record(…)`."""
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "record"
        and len(node.args) >= 2
    ]
    return {
        word.value
        for call in calls
        for word in ast.walk(call.args[0])
        if isinstance(word, ast.Constant) and isinstance(word.value, str)
    }


def test_every_action_of_the_audit_log_is_explained() -> None:
    table = (ROOT / "docs/audit.md").read_text(encoding="utf-8").split("## Reading")[0]
    explained = set(re.findall(r"`([a-z-]+)`", table))
    used = {path: actions_in(path) for path in tracked() if re.fullmatch(r"provisioning/.*\.py", path)}
    assert len(set().union(*used.values())) > 25
    assert {path: actions - explained for path, actions in used.items() if not actions <= explained} == {}
