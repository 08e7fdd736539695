"""Values with named fields that never change, as `dataclass(frozen=True, slots=True)` makes them, but quickly.

    class Reading(Frozen):
        celsius: float
        place: str = ""

Rules:

- Type checkers read such a class as a frozen dataclass. A subclass adds its fields after those of its base.
- A class may check its values in `__post_init__`, and keep some out of its `repr` (`secret=("key_der",)`).
- A default is one value for all: it must be immutable.
- Every annotated name is a field. The module has `from __future__ import annotations`: no annotation is evaluated.

Why not dataclasses: they write and compile six methods for each class, half a millisecond, and bring in what takes
programs apart. A client has some thirty such classes, and needed a fifth of its time to a connection for that.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform


@dataclass_transform(frozen_default=True)
class _FrozenType(type):
    """Makes a slot of each annotated name."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], *, secret: tuple[str, ...] = ()
    ) -> _FrozenType:
        """Make a class; its fields are those of its one base, and then its own."""
        base = bases[0] if bases else None
        own = tuple(namespace.get("__annotations__", ())) if base else ()
        fields = getattr(base, "_fields", ()) + own
        namespace["__slots__"] = own
        namespace["__match_args__"] = namespace["_fields"] = fields
        namespace["_defaults"] = getattr(base, "_defaults", {}) | {
            field: namespace.pop(field) for field in own if field in namespace
        }
        namespace["_shown"] = getattr(base, "_shown", ()) + tuple(field for field in own if field not in secret)
        if fields:
            namespace["_content"] = attrgetter(*fields)
        return super().__new__(cls, name, bases, namespace)


class Frozen(metaclass=_FrozenType):
    """A value: made of its fields in their order or by name, equal to another of its class with equal fields."""

    _fields: ClassVar[tuple[str, ...]]
    _defaults: ClassVar[dict[str, Any]]
    _shown: ClassVar[tuple[str, ...]]
    _content: ClassVar[attrgetter[Any]]

    if not TYPE_CHECKING:  # type checkers know a signature for each class

        def __init__(self, *values: Any, **named: Any) -> None:
            fields = self._fields
            if named or len(values) != len(fields):
                values = self._in_order(values, named)
            for field, value in zip(fields, values, strict=True):
                object.__setattr__(self, field, value)
            self.__post_init__()

    def __post_init__(self) -> None:
        """Check the values; here, any will do."""

    @classmethod
    def _in_order(cls, values: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        given = dict(zip(cls._fields, values, strict=False))
        content = {**cls._defaults, **given, **named}
        wrong = {
            "missing": [field for field in cls._fields if field not in content],
            "unknown": [*(name for name in named if name not in cls._fields), *values[len(cls._fields) :]],
            "given twice": [name for name in named if name in given],
        }
        if any(wrong.values()):
            said = ", ".join(f"{what}: {len(which)}" for what, which in wrong.items() if which)
            raise TypeError(f"{cls.__name__} takes {', '.join(cls._fields)}; {said}")
        return [content[field] for field in cls._fields]

    def changed(self, **named: Any) -> Self:
        """Return a value like this one but for the fields in `named`; it is checked as a new one."""
        made: Any = type(self)
        return made(**{field: getattr(self, field) for field in self._fields} | named)  # type: ignore[no-any-return]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, those of frozen values in them too, secret ones included."""
        content = {field: getattr(self, field) for field in self._fields}
        return {name: value.as_dict() if isinstance(value, Frozen) else value for name, value in content.items()}

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: a value never changes."""
        raise AttributeError(f"could not set {name}: {type(self).__name__} is frozen")

    def __delattr__(self, name: str) -> None:
        """Refuse: a value never changes."""
        raise AttributeError(f"could not delete {name}: {type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        """Whether `other` is of the same class and has the same content."""
        if other.__class__ is not self.__class__:
            return NotImplemented
        return bool(self._content(self) == self._content(other))

    def __hash__(self) -> int:
        """Of the content."""
        return hash(self._content(self))

    def __repr__(self) -> str:
        """The class and its fields, without those that are secret."""
        shown = ", ".join(f"{field}={getattr(self, field)!r}" for field in self._shown)
        return f"{type(self).__qualname__}({shown})"

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """For copies: made anew from the content."""
        return type(self), tuple(getattr(self, field) for field in self._fields)
