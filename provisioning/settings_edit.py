"""Changes of `station.toml` by a command: they edit the text, so that a person's comments stay.

Two commands at once do it one after the other, and what comes out is read as strictly as ever before it is kept.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from birthmark.device.durable import exclusive_lock, remove_leftovers, write_durably
from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import escaped
from birthmark.provisioning.settings import TokenSettings, parsed, settings_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from birthmark.provisioning.gateway_settings import Gateway, Upstream
    from birthmark.provisioning.settings import RegistrySetting, Settings

_GATEWAY: Final = re.compile(r"(?m)^[ \t]*\[\[[ \t]*gateway[ \t]*\]\]")
_UPSTREAM: Final = re.compile(r"(?m)^[ \t]*\[\[[ \t]*upstream[ \t]*\]\]")
_REGISTRY: Final = re.compile(r"(?m)^[ \t]*\[[ \t]*registry[ \t]*\]")
_TABLE: Final = re.compile(r"(?m)(?:^[ \t]*(?:#.*)?\n)*^[ \t]*\[")
"""Where another table begins: with the comments that stand before it."""


def add_gateway(path: Path, gateway: Gateway) -> None:
    """Add a gateway to `station.toml`, durably.

    Raises:
        ConfigurationError: the file cannot be used, or has a gateway of that name.
    """

    def added(text: str, settings: Settings) -> str:
        check_new(gateway, settings)
        return text.rstrip("\n") + "\n\n" + gateway.to_toml()

    _edit(path, added)


def check_new(gateway: Gateway, settings: Settings) -> None:
    """Refuse a gateway whose name another one has; `ConfigurationError`."""
    if any(other.name.lower() == gateway.name.lower() for other in settings.gateways):
        raise ConfigurationError(
            f"could not add the gateway {gateway.name}: there is one of that name",
            hint=f"remove it first: birthmark gateway remove {gateway.name}",
        )


def remove_gateway(path: Path, name: str) -> None:
    """Remove a gateway from `station.toml`, durably.

    Raises:
        ConfigurationError: the file cannot be used, or has no gateway of that name.
    """

    def removed(text: str, settings: Settings) -> str:
        return _without(text, path, "gateway", name, [gateway.name for gateway in settings.gateways])

    _edit(path, removed)


def add_upstream(path: Path, upstream: Upstream) -> None:
    """Add an upstream to `station.toml`, durably; errors as in `add_gateway`."""

    def added(text: str, settings: Settings) -> str:
        if any(other.name.lower() == upstream.name.lower() for other in settings.upstreams):
            raise ConfigurationError(
                f"could not add the upstream {upstream.name}: there is one of that name",
                hint=f"remove it first: birthmark upstream remove {upstream.name}",
            )
        gateway = _GATEWAY.search(text)
        at = gateway.start() if gateway else len(text)
        return text[:at].rstrip("\n") + "\n\n" + upstream.to_toml() + ("\n" + text[at:] if gateway else "")

    _edit(path, added)


def remove_upstream(path: Path, name: str) -> None:
    """Remove an upstream from `station.toml`, durably.

    Raises:
        ConfigurationError: the file cannot be used, has no upstream of that name, or one that gateways are behind.
    """

    def removed(text: str, settings: Settings) -> str:
        behind = [gateway.name for gateway in settings.gateways if gateway.via.lower() == name.lower()]
        if behind:
            raise ConfigurationError(
                f"could not remove the upstream {escaped(name)}: {', '.join(behind)} can be reached only by it",
                hint="remove these first: birthmark gateway remove NAME",
            )
        return _without(text, path, "upstream", name, [upstream.name for upstream in settings.upstreams])

    _edit(path, removed)


def set_token(path: Path, token: TokenSettings) -> None:
    """Put module and PIN file of the tokens into `station.toml`, durably, if there are none yet.

    Raises:
        ConfigurationError: the file cannot be used, or has others.
    """

    def changed(text: str, settings: Settings) -> str:
        if settings.token == token:
            return text
        if settings.token != TokenSettings():
            raise ConfigurationError(
                f"could not put the PKCS#11 module {token.module} into {path}: [token] there has something else",
                hint="a station uses one module at a time: change it there, once no key needs the other",
            )
        ours = [match.start() for match in (_UPSTREAM.search(text), _GATEWAY.search(text)) if match]
        at = min(ours, default=len(text))
        return f"{text[:at].rstrip()}\n\n{token.to_toml()}" + ("\n" + text[at:] if ours else "")

    _edit(path, changed)


def put_registry(path: Path, registry: RegistrySetting) -> None:
    """Say in `station.toml` where the registry is, durably.

    Raises:
        ConfigurationError: the file cannot be used; it is as it was.
    """

    def put(text: str, _settings: Settings) -> str:
        for match in reversed(list(_REGISTRY.finditer(text))):
            after = _TABLE.search(text, match.end())
            rest = text[after.start() :].lstrip("\n") if after else ""
            text = text[: match.start()].rstrip("\n") + "\n" + ("\n" + rest if rest else "")
        changed = "\n\n".join(filter(None, (text.rstrip("\n"), registry.to_toml().rstrip("\n")))) + "\n"
        if parsed(path, changed).registry != registry:
            raise ConfigurationError(
                f"could not change [registry] in {path}: it is not written as this program writes it",
                hint="write it as a table [registry] with a key url",
            )
        return changed

    _edit(path, put)


def _edit(path: Path, change: Callable[[str, Settings], str]) -> None:
    settings_text(path)  # says what is missing before a lock is made there
    with exclusive_lock(path.with_suffix(".lock")):
        remove_leftovers(path.parent, path.name)
        text = settings_text(path)
        changed = change(text, parsed(path, text))
        parsed(path, changed)
        write_durably(path, changed.encode())


def _without(text: str, path: Path, kind: str, name: str, names: Sequence[str]) -> str:
    """Return the text without one table [[gateway]] or [[upstream]]; `names` are those that are read there."""
    folded = [each.lower() for each in names]
    if name.lower() not in folded:
        raise ConfigurationError(
            f"could not remove the {kind} {escaped(name)}: there is none of that name",
            hint=f"list them with `birthmark {kind} list`",
        )
    heads = _GATEWAY if kind == "gateway" else _UPSTREAM
    starts = [match.start() for match in heads.finditer(text)]
    if len(starts) != len(names):
        raise ConfigurationError(
            f"could not remove the {kind} {name} from {path}: not every one there begins with [[{kind}]]",
            hint="take it out by hand",
        )
    start = starts[folded.index(name.lower())]
    after = _TABLE.search(text, text.index("]]", start))
    end = after.start() if after else len(text)
    return text[:start].rstrip("\n") + "\n\n" * bool(after) + text[end:].lstrip("\n") + "\n" * (not after)
