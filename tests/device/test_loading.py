"""The collector of cycles, while code is loaded and after."""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from birthmark.device.loading import loading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _unfrozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_was_loaded_is_looked_through_neither_meanwhile_nor_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "birthmark_was_loaded.py").write_text("HELD = [[]]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert gc.isenabled()
    with loading():
        assert not gc.isenabled()
        held = import_module("birthmark_was_loaded").HELD
        assert any(each is held for each in gc.get_objects())
    assert gc.isenabled()
    assert not any(each is held for each in gc.get_objects())


def test_where_nothing_was_loaded_everything_is_looked_through_still() -> None:
    with loading():
        held = [object()]
    assert any(each is held for each in gc.get_objects())
    assert gc.get_freeze_count() == 0


def test_the_collector_is_at_work_again_if_something_cannot_be_loaded() -> None:
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled()


def test_loading_within_loading_leaves_the_collector_at_rest() -> None:
    with loading():
        with loading():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
