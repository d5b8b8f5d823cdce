"""The search behind the API and the page: queries of all clients in one queue, a worker that answers them together.

What waits is embedded in one pass and searched in one, so that many clients cost little more than one. The model's
towers and FAISS are called by the worker alone; images are decoded, one at a time, by a second thread, so that a
large one holds up nobody else's text. Both queues are bounded: what does not fit is refused at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from torch import Tensor

from amclr.config.schema import ServeConfig
from amclr.search import query as search
from amclr.search.index import Index
from amclr.utils.errors import UserError

MAX_K = 100
"""Results of one answer; further ones are paged through."""
MAX_FILTER = 200
"""Characters of a text that names or captions must hold."""
MAX_UNWANTED = 8
"""Texts of one query that are not wanted; each is embedded."""
IMAGES_WAITING = 16
"""Uploaded images that may wait to be decoded: each is held in memory."""
TEXTS_KEPT = 4096
"""Embeddings of texts that are kept for who asks the same again."""
FILTERS_KEPT = 16

log = logging.getLogger("amclr.serve")


class Busy(Exception):
    """Too much waits already: the query was refused, and may be sent again."""


class Late(Exception):
    """The query was not answered within its time."""


class NoSuchImage(LookupError):
    """There is no such row."""


@dataclass(frozen=True)
class Query:
    """What is asked for: a text, an image (encoded bytes) or both; or a row to find others like; or a vector.

    A vector is that of an earlier answer, to page through its results.
    """

    text: str = ""
    image: bytes | Tensor | None = None
    image_share: float = 0.5
    row: int = -1
    vector: np.ndarray | None = None
    k: int = 12
    skip: int = 0
    threshold: float = -1.0
    only: str = ""


@dataclass(frozen=True)
class Answer:
    """Results; whether there are more after them; the vector that was searched for."""

    hits: list[search.Hit]
    more: bool
    vector: np.ndarray


@dataclass
class _Task:
    query: Query
    wanted: str
    unwanted: list[str]
    until: float
    future: Future[Answer] = field(default_factory=Future)

    @property
    def texts(self) -> list[str]:
        return [t for t in (self.wanted, *self.unwanted) if t]

    @property
    def depth(self) -> int:
        """Rows to find: one more tells whether there are more; an image finds itself."""
        return self.query.skip + self.query.k + 1 + (self.query.row >= 0)


class Metrics:
    """What is counted, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        to = self.registry
        self.requests = Counter("amclr_requests", "Requests, by route and status", ["route", "status"], registry=to)
        self.seconds = Histogram("amclr_request_seconds", "Time to the whole answer", ["route"], registry=to)
        self.refused = Counter("amclr_refused", "Requests and queries refused, by reason", ["reason"], registry=to)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batches = Histogram("amclr_batch_queries", "Queries answered together", buckets=sizes, registry=to)
        self.texts = Counter("amclr_texts", "Texts of queries, embedded or kept from before", ["how"], registry=to)
        self.waiting = Gauge("amclr_waiting_queries", "Queries that wait for the worker", registry=to)
        self.images = Gauge("amclr_index_images", "Images in the index", registry=to)


class Service:
    """Answers queries to an index. `submit` from any thread, `ask` from an event loop; `close` ends it.

    Raises UserError, as `Index` does, where the folder has none, or is damaged.
    """

    def __init__(self, folder: Path, config: ServeConfig | None = None) -> None:
        self.config = config or ServeConfig()
        self.index = Index(folder)
        self.metrics = Metrics()
        self.metrics.images.set(len(self.index))
        self.has_thumbnails = bool(len(self.index)) and bool(self.index.thumbnail(0))
        self._texts = _Kept(TEXTS_KEPT)
        self._filters = _Kept(FILTERS_KEPT)
        self._queue: Queue[_Task | None] = Queue(self.config.waiting)
        self.metrics.waiting.set_function(self._queue.qsize)
        self._decoder = ThreadPoolExecutor(1, "decoder")
        self._decoding = threading.BoundedSemaphore(IMAGES_WAITING)
        self._closed = False
        # Reads all of the index, and checks it, before anybody asks.
        if len(self.index):
            self.index.row(0)
            self.index.search(self.index.vector(0), 1)
        self.index.model.encode_text(["a first text takes longer"])
        self._worker = threading.Thread(target=self._work, name="search", daemon=True)
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._worker.is_alive() and not self._closed

    def close(self) -> None:
        """Answer what waits, and end."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._worker.join()
            self._decoder.shutdown(cancel_futures=True)

    def submit(self, query: Query) -> Future[Answer]:
        """Put a query in the queue; its image, if it has one, decoded already.

        Raises UserError for a query that cannot be answered, NoSuchImage for a row that is not there, Busy where
        too many wait.
        """
        task = self._understood(query)
        if self._closed:
            raise Busy
        try:
            self._queue.put_nowait(task)
        except Full:
            self.metrics.refused.labels("queue").inc()
            raise Busy from None
        return task.future

    def decode(self, image: bytes) -> Future[Tensor]:
        """Have an image decoded, for `submit`. Its future, or this, raises BadImage, or Busy where too many wait."""
        if not self._decoding.acquire(blocking=False):
            self.metrics.refused.labels("images").inc()
            raise Busy
        try:
            future = self._decoder.submit(self.index.model.prepare, image)
        except RuntimeError:  # closed
            self._decoding.release()
            raise Busy from None
        future.add_done_callback(lambda _: self._decoding.release())
        return future

    async def ask(self, query: Query) -> Answer:
        """Answer a query. Raises what `submit` and `decode` do, and Late where it takes too long."""
        try:
            async with asyncio.timeout(self.config.deadline):
                if isinstance(query.image, bytes):
                    self._understood(query)  # before the work of decoding
                    image: Tensor = await asyncio.wrap_future(self.decode(query.image))
                    query = replace(query, image=image)
                return await asyncio.wrap_future(self.submit(query))
        except (TimeoutError, Late):
            self.metrics.refused.labels("deadline").inc()
            raise Late from None

    def _understood(self, query: Query) -> _Task:
        for what, text in (("query", query.text), ("filter", query.only)):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"the {what} must be a text: it holds half a character") from None
            if "\0" in text:
                raise UserError(f"the {what} must be a text: it holds a zero byte")
        wanted, unwanted = search.parse(query.text)
        if len(unwanted) > MAX_UNWANTED:
            raise UserError(f"at most {MAX_UNWANTED} texts may be unwanted, got {len(unwanted)}")
        if len(query.only) > MAX_FILTER:
            raise UserError(f"the filter must have {MAX_FILTER} characters at the most, got {len(query.only)}")
        if not 1 <= query.k <= MAX_K:
            raise UserError(f"k must be 1 to {MAX_K}, got {query.k}")
        if not 0 <= query.skip <= search.DEEPEST - query.k:
            raise UserError(f"results must be among the first {search.DEEPEST:,}, got {query.k} after {query.skip}")
        if not 0 <= query.image_share <= 1:
            raise UserError(f"the image's share must lie between 0 and 1, got {query.image_share:g}")
        if not -1 <= query.threshold <= 1:
            raise UserError(f"the threshold must lie between -1 and 1, got {query.threshold:g}")
        if query.row >= len(self.index):
            raise NoSuchImage
        if query.row < 0 and query.vector is None and query.image is None and not wanted and not unwanted:
            raise UserError("nothing is asked for: give a text, an image, or both")
        return _Task(query, wanted, unwanted, time.monotonic() + self.config.deadline)

    # -- the worker -------------------------------------------------------------------------------

    def _work(self) -> None:
        going = True
        while going:
            tasks = [self._queue.get()]
            while len(tasks) < self.config.batch:
                try:
                    tasks.append(self._queue.get_nowait())
                except Empty:
                    break
            going = None not in tasks
            live = []
            for task in filter(None, tasks):
                if not task.future.set_running_or_notify_cancel():
                    continue
                if time.monotonic() > task.until:
                    task.future.set_exception(Late())
                else:
                    live.append(task)
            if live:
                self.metrics.batches.observe(len(live))
                self._settle(live)

    def _settle(self, tasks: Sequence[_Task]) -> None:
        try:
            answers = self._answers(tasks)
        except Exception as error:
            if len(tasks) == 1:
                if not isinstance(error, UserError):
                    log.exception("a query failed")
                tasks[0].future.set_exception(error)
            else:  # so that a query fails alone
                for task in tasks:
                    self._settle([task])
            return
        for task, answer in zip(tasks, answers, strict=True):
            task.future.set_result(answer)

    def _answers(self, tasks: Sequence[_Task]) -> list[Answer]:
        vectors = self._vectors(tasks)
        groups: dict[tuple[str, int], list[int]] = {}
        for number, task in enumerate(tasks):
            # A page far down must not make all others look as deep.
            groups.setdefault((task.query.only.strip().casefold(), task.depth.bit_length()), []).append(number)
        answers: dict[int, Answer] = {}
        for (only, _), numbers in groups.items():
            among = self._filters.find(only)
            if among is None and only:
                among = self._filters.keep(only, search.matching(self.index, only))
            depth = max(tasks[n].depth for n in numbers)
            scores, rows = self.index.search(np.stack([vectors[n] for n in numbers]), depth, among)
            for place, n in enumerate(numbers):
                query = tasks[n].query
                hits = search.read_hits(self.index, scores[place], rows[place], query.k + 1, query.skip,
                                        query.threshold, query.row)  # fmt: skip
                answers[n] = Answer(hits[: query.k], len(hits) > query.k, vectors[n])
        return [answers[n] for n in range(len(tasks))]

    def _vectors(self, tasks: Sequence[_Task]) -> list[np.ndarray]:
        """The unit vector (D,) of each query: what `search.embed` makes of it."""
        model = self.index.model
        asked = [text for task in tasks for text in task.texts]
        known = {text: row for text in asked if (row := self._texts.find(text)) is not None}
        new = list(dict.fromkeys(text for text in asked if text not in known))
        self.metrics.texts.labels("embedded").inc(len(new))
        self.metrics.texts.labels("kept").inc(len(asked) - len(new))
        for text, row in zip(new, model.encode_text(new), strict=True):
            known[text] = self._texts.keep(text, row.clone())  # not a view of the whole batch
        seen = [n for n, task in enumerate(tasks) if task.query.image is not None]
        looks = dict(zip(seen, model.encode_image([tasks[n].query.image for n in seen]), strict=True))  # type: ignore[misc]

        def rows(texts: Sequence[str]) -> Tensor:
            return torch.stack([known[t] for t in texts]) if texts else empty

        empty = torch.empty(0, self.index.dim)
        vectors = []
        for n, task in enumerate(tasks):
            if task.query.vector is not None:
                vectors.append(task.query.vector)
            elif task.query.row >= 0:
                vectors.append(self.index.vector(task.query.row))
            else:
                image = looks[n][None] if n in looks else empty
                texts = [task.wanted] if task.wanted else []
                vectors.append(search.combined(rows(texts), image, rows(task.unwanted), task.query.image_share))
        return vectors


def shown_name(name: str) -> str:
    """An image's name; of one that is a whole path, the last part."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    return windows.name if windows.drive or windows.root or posix.is_absolute() else name


class _Kept:
    """Values under texts: those used last, up to a number."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: OrderedDict[str, Any] = OrderedDict()

    def find(self, text: str) -> Any:
        """What is kept under a text; None where nothing is."""
        if text in self._values:
            self._values.move_to_end(text)
        return self._values.get(text)

    def keep(self, text: str, value: Any) -> Any:
        """Keep a value, in place of that used longest ago."""
        self._values[text] = value
        if len(self._values) > self.most:
            self._values.popitem(last=False)
        return value
