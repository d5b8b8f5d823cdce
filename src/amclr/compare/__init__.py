"""Runs of an experiment file that differ only in what is compared, and the tests of their differences.

comparison = amclr.compare.compare(Path("experiment.yaml"))
"""

from amclr.compare.results import Comparison
from amclr.compare.runner import compare

__all__ = ["Comparison", "compare"]
