"""Image search: build an index of images, search it, label images, find near-duplicates.

built = amclr.search.build("runs/photos", "photos", "indexes/photos")
index, hits = amclr.search.search("indexes/photos", "a dog on the beach")
"""

from typing import TYPE_CHECKING

from amclr.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from amclr.search.builder import build
    from amclr.search.index import Index
    from amclr.search.labels import label
    from amclr.search.near_duplicates import dedup
    from amclr.search.query import Hit, embed, find, search

__all__ = ["Hit", "Index", "build", "dedup", "embed", "find", "label", "search"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Hit": "query",
        "Index": "index",
        "build": "builder",
        "dedup": "near_duplicates",
        "embed": "query",
        "find": "query",
        "label": "labels",
        "search": "query",
    },
)
