"""The house as the imports draw it: four parts, and arrows only to the ground floor."""

from __future__ import annotations

import ast
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest
from support.repository import PARTS, ROOT, tracked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ARROWS = {"device": set(), "broker": {"device"}, "provisioning": {"device"}, "firmware_sim": {"device"}}

# The libraries that each part may use; `cryptography` and `paho` are the device's own, and so everybody's.
LIBRARIES = {
    "device": {"paho", "cryptography", "serial"},
    "broker": {"amqtt", "cryptography", "uvloop"},
    "provisioning": {"tinydb", "orjson", "segno", "sqlalchemy", "pkcs11", "cryptography", "paho", "serial"},
    "firmware_sim": {"cryptography"},
}


def modules(part: str) -> list[str]:
    return [path for path in tracked() if path.startswith(f"{part}/") and path.endswith(".py")]


def imports(path: str, walk: Callable[[ast.Module], Iterator[ast.AST]] = ast.walk) -> Iterator[str]:
    """Yield the dotted names that a module imports, in the nodes that `walk` yields."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), path)
    for node in walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name, not a relative import"
            module = node.module or ""
            # `from birthmark import broker` names a part only in what it takes.
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what importing a module runs."""
    return _nodes(tree, into_functions=False)


def ever(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what may run; an import for the type checker alone never does."""
    return _nodes(tree, into_functions=True)


def _nodes(tree: ast.Module, *, into_functions: bool) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if not into_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def part_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "birthmark" and len(parts) > 1 else None


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_what_the_design_draws(part: str) -> None:
    assert modules(part)
    for path in modules(part):
        for name in imports(path):
            target = part_of(name)
            assert name.split(".")[0] not in PARTS, f"{path} imports {name}: write birthmark.{name}"
            if target is not None:
                assert target == part or target in ARROWS[part], f"{path} imports {name}"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_uses_only_its_own_libraries(part: str) -> None:
    for path in modules(part):
        for name in imports(path, ever):
            top = name.split(".")[0]
            if top != "birthmark" and top not in sys.stdlib_module_names:
                assert top in LIBRARIES[part], f"{path} imports {name}"


@pytest.mark.parametrize("part", PARTS)
def test_importing_a_package_runs_no_foreign_code(part: str) -> None:
    packages = [path for path in modules(part) if path.endswith("/__init__.py")]
    assert f"{part}/__init__.py" in packages
    for path in packages:
        for name in imports(path, at_import):
            assert name.split(".")[0] in sys.stdlib_module_names, f"{path} imports {name} when it is imported"


def test_the_walk_sees_what_importing_runs_and_nothing_else() -> None:
    source = """
import one
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import two
else:
    import three
try:
    import four
except ImportError:
    pass
def later():
    import five
class Now:
    import six
"""
    seen = {
        alias.name for node in at_import(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert seen == {"one", "three", "four", "six"}


def test_there_are_four_parts_and_no_other_code() -> None:
    code = {path.split("/")[0] for path in tracked() if path.endswith(".py") and "/" in path}
    assert code <= {*PARTS, "tests", "demo", "bench", "examples"}
    assert set(PARTS) <= code
    assert "birthmark/__init__.py" not in tracked()


def test_every_package_is_listed_for_the_wheel_and_typed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {
        "birthmark." + path.removesuffix("/__init__.py").replace("/", ".")
        for part in PARTS
        for path in modules(part)
        if path.endswith("/__init__.py")
    }
    assert packages == set(setuptools["packages"])
    for part in PARTS:
        assert (ROOT / part / "py.typed").is_file()
        assert (ROOT / ".types" / "birthmark" / part).resolve() == (ROOT / part).resolve()


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.rsplit("/", 1)[0] for part in PARTS for path in modules(part)}
    assert {folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()} == set()


def test_no_module_is_called_after_having_no_name() -> None:
    nameless = {"utils", "util", "helpers", "helper", "common", "misc"}
    stems = {path: path.rsplit("/", 1)[-1].removesuffix(".py") for path in tracked()}
    assert {path for path, stem in stems.items() if stem in nameless} == set()
    assert {path for path in tracked() if nameless & set(path.split("/")[:-1])} == set()
