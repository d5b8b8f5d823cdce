"""A cache of the values used last."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """Values by text; beyond `size`, the value used longest ago is dropped."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, text: str) -> Value | None:
        """The value of a text, or None."""
        if text in self._values:
            self._values.move_to_end(text)
        return self._values.get(text)

    def put(self, text: str, value: Value) -> Value:
        """Store and return the value of a text."""
        self._values[text] = value
        if len(self._values) > self.size:
            self._values.popitem(last=False)
        return value
