"""Config sections whose unknown keys are answered in one line, with the nearest name."""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.errors import UserError, nearest, quoted


class UnknownKey(UserError, KeyError):
    """A key that a config does not have was read or set.

    As an attribute (`config.optim.lrr = 1`) it arrives as an `AttributeError` of the same text.
    """

    def __init__(self, section: str, key: str, known: Iterable[str]):
        super().__init__(section, key)
        self._known = list(map(str, known))

    def __str__(self) -> str:
        section, key = self.args
        return f"{section} has no key {quoted(key)}; {nearest(str(key), self._known)}"


class Section(ConfigDict):
    """A `ConfigDict` that raises `UnknownKey` where the library prints the whole config."""

    @classmethod
    def of(cls, values: Mapping[str, Any], path: str = "config") -> "Section":
        """Returns a config with the keys and the sections of a nested mapping.

        path: the section as users write it, such as `config.optim`.
        """
        section = cls(type_safe=False)
        object.__setattr__(section, "_path", path)
        for name, value in values.items():
            is_section = isinstance(value, Mapping)
            section[name] = cls.of(value, f"{path}.{name}") if is_section else value
        return section

    def __getitem__(self, key: str) -> Any:
        try:
            return super().__getitem__(key)
        except UnknownKey:
            raise
        except KeyError:
            raise UnknownKey(self._written(), key, self.keys()) from None

    def __setitem__(self, key: str, value: Any) -> None:
        try:
            super().__setitem__(key, value)
        except KeyError:
            raise UnknownKey(self._written(), key, self.keys()) from None
        child = self._fields[key]
        if isinstance(child, Section):
            object.__setattr__(child, "_path", f"{self._written()}.{key}")

    def _written(self) -> str:
        return self.__dict__.get("_path", "config")
