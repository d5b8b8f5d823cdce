"""Search in an index over HTTP: an API and a page. `amclr serve` starts it; needs the extra `serve`."""

from typing import TYPE_CHECKING

from amclr.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from amclr.serve.server import serve

__all__ = ["serve"]

__getattr__, __dir__ = lazy_exports(__name__, {"serve": "server"})
