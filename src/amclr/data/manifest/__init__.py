"""A data set as a list of samples: what it holds, where it lies, and what could not be used.

To add a source format, write a reader (a function that yields rows) and list it in `sources.formats.FORMATS`.
"""

from amclr.data.manifest.loading import cache_folder, folded_splits, load, prepare
from amclr.data.manifest.samples import Manifest, Sample
from amclr.data.sources.formats import label

__all__ = ["Manifest", "Sample", "cache_folder", "folded_splits", "label", "load", "prepare"]
