"""State of an objective apart from its state dict: what a call overwrites, and tables over other samples."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from amclr.objectives.adaptive import AdaptiveGamma
from amclr.objectives.positives import Labels
from amclr.objectives.queue import Queue
from amclr.objectives.tables import Table


class Overwritten:
    """What a call is about to overwrite in tables, statistics and queue. labels: of the whole batch."""

    def __init__(
        self, tables: Mapping[str, Table], adaptive: AdaptiveGamma | None, queue: Queue | None, labels: Labels
    ) -> None:
        self.adaptive, self.queue = adaptive, queue
        self.rows = []
        for name, table in tables.items():
            ids = labels.ids[name.rpartition("_")[2]]
            self.rows.append((table, ids, table.read(ids, 0, table.values.shape[1], table.values)))
        self.statistics = {name: b.clone() for name, b in adaptive.state_dict().items()} if adaptive else {}
        self.queued = None if queue is None else queue.state

    def restore(self) -> None:
        """Put it back."""
        for table, ids, values in self.rows:
            table.write(ids, 0, table.values.shape[1], values)
        if self.adaptive:
            self.adaptive.load_state_dict(self.statistics)
        if self.queue is not None and self.queued is not None:
            self.queue.state = self.queued


def remapped(tables: Mapping[str, Table], state: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """A state dict whose tables are those of other samples: row i is row `rows[i]` of `state`, or as now where -1."""
    known = rows >= 0
    result = dict(state)
    for name, table in tables.items():
        key = f"{name}.values"
        values = table.values.detach().cpu().clone()
        values[known] = state[key].cpu()[rows[known]]
        result[key] = values
    return result
