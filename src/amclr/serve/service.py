"""The search behind the API and the page: a worker answers the queued queries of all clients in batches.

All waiting queries are embedded and searched together, so many clients cost little more than one. Only the worker
calls the model's towers and FAISS. A second thread decodes images one at a time, so a large image does not delay text
queries. Both queues are bounded: queries that do not fit are refused at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from queue import Empty, Full, Queue

import numpy as np
import torch
from torch import Tensor

from amclr.config.schema import ServeConfig
from amclr.search.index import Index
from amclr.search.query import MAX_DEPTH, Hit, combine, parse, read_hits, text_mask
from amclr.serve.cache import LRUCache
from amclr.serve.metrics import Metrics
from amclr.utils.errors import UserError

MAX_K = 100
"""Maximum results of one answer; clients page through the others."""
MAX_FILTER = 200
"""Maximum characters of a filter on names and captions."""
MAX_NEGATIVES = 8
"""Maximum negatives of a query; each is embedded."""
MAX_WAITING_IMAGES = 16
"""Maximum uploaded images waiting to be decoded; each is held in memory."""
CACHED_TEXTS = 4096
CACHED_FILTERS = 16

log = logging.getLogger("amclr.serve")


class Busy(Exception):
    """The queue is full: the query was refused, and may be sent again."""


class DeadlineExceeded(Exception):
    """The query was not answered in time."""


class NoSuchImage(LookupError):
    """The index has no such row."""


@dataclass(frozen=True)
class Query:
    """A query by a text, an image (encoded bytes) or both; by a row, for images like it; or by a vector.

    The vector of an earlier answer serves to page through its results.
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
    """Results, whether more follow, and the query vector (D,)."""

    hits: list[Hit]
    more: bool
    vector: np.ndarray


@dataclass
class _Task:
    query: Query
    positive: str
    negatives: list[str]
    deadline: float
    future: Future[Answer] = field(default_factory=Future)

    @property
    def texts(self) -> list[str]:
        return [t for t in (self.positive, *self.negatives) if t]

    @property
    def depth(self) -> int:
        """Rows to search for: one extra tells whether more follow, and a row finds itself."""
        return self.query.skip + self.query.k + 1 + (self.query.row >= 0)


class Service:
    """Answers queries to an index: `submit` from any thread, `ask` from an event loop, then `close`.

    Raises UserError, as `Index` does, if the folder is not an index or is damaged.
    """

    def __init__(self, folder: Path, config: ServeConfig | None = None) -> None:
        self.config = config or ServeConfig()
        self.index = Index(folder)
        self.metrics = Metrics()
        self.metrics.images.set(len(self.index))
        self.has_thumbnails = bool(len(self.index)) and bool(self.index.thumbnail(0))
        self._texts: LRUCache[Tensor] = LRUCache(CACHED_TEXTS)
        self._filters: LRUCache[np.ndarray | None] = LRUCache(CACHED_FILTERS)
        self._queue: Queue[_Task | None] = Queue(self.config.waiting)
        self.metrics.waiting.set_function(self._queue.qsize)
        self._decoder = ThreadPoolExecutor(1, "decoder")
        self._decoding = threading.BoundedSemaphore(MAX_WAITING_IMAGES)
        self._closed = False
        # Read and verify the whole index before the first query.
        if len(self.index):
            self.index.image(0)
            self.index.search(self.index.vector(0), 1)
        self.index.model.encode_text(["the first text takes longer"])
        self._worker = threading.Thread(target=self._work, name="search", daemon=True)
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether it answers queries."""
        return self._worker.is_alive() and not self._closed

    def close(self) -> None:
        """Answer the queries in the queue, and stop."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._worker.join()
            self._decoder.shutdown(cancel_futures=True)

    def submit(self, query: Query) -> Future[Answer]:
        """Queue a query; its image, if any, must be decoded (see `decode`).

        Raises UserError for an invalid query, NoSuchImage for a row that does not exist, Busy if the queue is full.
        """
        task = self._validate(query)
        if self._closed:
            raise Busy
        try:
            self._queue.put_nowait(task)
        except Full:
            self.metrics.refused.labels("queue").inc()
            raise Busy from None
        return task.future

    def decode(self, image: bytes) -> Future[Tensor]:
        """Queue an image to be decoded for `submit`. Raises Busy if the queue is full; the future raises BadImage."""
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
        """Answer a query. Raises what `submit` and `decode` raise, and DeadlineExceeded if it takes too long."""
        try:
            async with asyncio.timeout(self.config.deadline):
                if isinstance(query.image, bytes):
                    self._validate(query)  # before spending time on decoding
                    image: Tensor = await asyncio.wrap_future(self.decode(query.image))
                    query = replace(query, image=image)
                return await asyncio.wrap_future(self.submit(query))
        except (TimeoutError, DeadlineExceeded):
            self.metrics.refused.labels("deadline").inc()
            raise DeadlineExceeded from None

    def _validate(self, query: Query) -> _Task:
        for kind, text in (("query", query.text), ("filter", query.only)):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"the {kind} must be valid Unicode: it has an unpaired surrogate") from None
            if "\0" in text:
                raise UserError(f"the {kind} must not contain a zero byte")
        positive, negatives = parse(query.text)
        if len(negatives) > MAX_NEGATIVES:
            raise UserError(f"a query may have at most {MAX_NEGATIVES} negatives, got {len(negatives)}")
        if len(query.only) > MAX_FILTER:
            raise UserError(f"the filter must have at most {MAX_FILTER} characters, got {len(query.only)}")
        if not 1 <= query.k <= MAX_K:
            raise UserError(f"k must be 1 to {MAX_K}, got {query.k}")
        if not 0 <= query.skip <= MAX_DEPTH - query.k:
            raise UserError(f"results must be among the first {MAX_DEPTH:,}, got {query.k} after {query.skip}")
        if not 0 <= query.image_share <= 1:
            raise UserError(f"the image's share must lie between 0 and 1, got {query.image_share:g}")
        if not -1 <= query.threshold <= 1:
            raise UserError(f"the threshold must lie between -1 and 1, got {query.threshold:g}")
        if query.row >= len(self.index):
            raise NoSuchImage
        if query.row < 0 and query.vector is None and query.image is None and not positive and not negatives:
            raise UserError("the query is empty: give a text, an image, or both")
        return _Task(query, positive, negatives, time.monotonic() + self.config.deadline)

    # -- the worker -------------------------------------------------------------------------------

    def _work(self) -> None:
        is_open = True
        while is_open:
            tasks = [self._queue.get()]
            while len(tasks) < self.config.batch:
                try:
                    tasks.append(self._queue.get_nowait())
                except Empty:
                    break
            is_open = None not in tasks
            due = []
            for task in filter(None, tasks):
                if not task.future.set_running_or_notify_cancel():
                    continue
                if time.monotonic() > task.deadline:
                    task.future.set_exception(DeadlineExceeded())
                else:
                    due.append(task)
            if due:
                self.metrics.batches.observe(len(due))
                self._resolve(due)

    def _resolve(self, tasks: Sequence[_Task]) -> None:
        try:
            answers = self._answer(tasks)
        except Exception as error:
            if len(tasks) == 1:
                if not isinstance(error, UserError):
                    log.exception("a query failed")
                tasks[0].future.set_exception(error)
            else:  # one by one, so that only the query at fault fails
                for task in tasks:
                    self._resolve([task])
            return
        for task, answer in zip(tasks, answers, strict=True):
            task.future.set_result(answer)

    def _answer(self, tasks: Sequence[_Task]) -> list[Answer]:
        vectors = self._query_vectors(tasks)
        groups: dict[tuple[str, int], list[int]] = {}
        for number, task in enumerate(tasks):
            # A deep page must not make all other queries search as deep.
            groups.setdefault((task.query.only.strip().casefold(), task.depth.bit_length()), []).append(number)
        answers: dict[int, Answer] = {}
        for (only, _), numbers in groups.items():
            mask = self._filters.get(only)
            if mask is None and only:
                mask = self._filters.put(only, text_mask(self.index, only))
            depth = max(tasks[n].depth for n in numbers)
            scores, rows = self.index.search(np.stack([vectors[n] for n in numbers]), depth, mask)
            for position, n in enumerate(numbers):
                query = tasks[n].query
                hits = read_hits(self.index, scores[position], rows[position], query.k + 1, query.skip,
                                        query.threshold, query.row)  # fmt: skip
                answers[n] = Answer(hits[: query.k], len(hits) > query.k, vectors[n])
        return [answers[n] for n in range(len(tasks))]

    def _query_vectors(self, tasks: Sequence[_Task]) -> list[np.ndarray]:
        """The unit vector (D,) of each query, as `amclr.search.embed` computes it."""
        model = self.index.model
        texts = [text for task in tasks for text in task.texts]
        known = {text: row for text in texts if (row := self._texts.get(text)) is not None}
        new = list(dict.fromkeys(text for text in texts if text not in known))
        self.metrics.texts.labels("embedded").inc(len(new))
        self.metrics.texts.labels("kept").inc(len(texts) - len(new))
        for text, row in zip(new, model.encode_text(new), strict=True):
            known[text] = self._texts.put(text, row.clone())  # not a view of the whole batch
        with_image = [n for n, task in enumerate(tasks) if task.query.image is not None]
        images = model.encode_image([tasks[n].query.image for n in with_image])  # type: ignore[misc]
        image_rows = dict(zip(with_image, images, strict=True))

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
                image = image_rows[n][None] if n in image_rows else empty
                positives = [task.positive] if task.positive else []
                vectors.append(combine(rows(positives), image, rows(task.negatives), task.query.image_share))
        return vectors


def display_name(name: str) -> str:
    """The name under which clients see an image: of an absolute path only the last part."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    return windows.name if windows.drive or windows.root or posix.is_absolute() else name
