"""Export of a trained model to the formats of other libraries, each compared with the model before it is kept."""

from typing import TYPE_CHECKING

from amclr.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from amclr.export.base import FORMATS
    from amclr.export.exporter import export

__all__ = ["FORMATS", "export"]

__getattr__, __dir__ = lazy_exports(__name__, {"FORMATS": "base", "export": "exporter"})
