"""``repr`` of a configuration and of its sections: only the fields that differ from their defaults."""

from __future__ import annotations

import dataclasses
from typing import Any


class ShortRepr:
    """Base class of the configuration's dataclasses, which set ``repr=False`` to inherit this ``repr``."""

    def __repr__(self) -> str:
        """A call that constructs an equal object: ``EncoderConfig(n_layers=4, d_model=144)``."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
        shown = [
            (field.name, self._shown(field.name)) for field in fields if self._shown(field.name) != _default(field)
        ]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"

    def _shown(self, name: str) -> Any:
        """The value of a field that is compared with the field's default, and printed if it differs."""
        return getattr(self, name)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
