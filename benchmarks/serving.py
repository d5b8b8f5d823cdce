"""Load test of `amclr serve`: requests, errors, latency, and the server's memory at the start, middle and end.

    python -m benchmarks.serving MODEL                  # ten minutes, 32 clients, 100,000 images
    python -m benchmarks.serving MODEL --minutes 2

MODEL is what `amclr.load` takes. The index is synthetic: rows around the model's embeddings of texts. Each client sends
its next request after the answer to the last: texts (80 %, few of them repeated), images similar to one of the index
(10 %), uploaded images (2 %) and thumbnails (8 %). The clients run on the same machine, in another process.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
from PIL import Image

WORDS = (
    "a brown|a black|a small|an old|a red|a wet|a tired|a tall|a striped|a young|a yellow|a happy",
    "dog|cat|horse|child|man|woman|bird|car|boat|bicycle|train|ball|tree|house|sheep|bus|kite|girl|boy|truck",
    "runs|sits|stands|jumps|waits|is seen|rests|moves|turns|stops",
    "on a beach|in the snow|by a lake|in a street|on grass|at night|under a bridge|near a wall|in a park|on a hill",
)
CENTRES = 2000


def texts(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(str(draw.choice(group.split("|"))) for group in WORDS) for _ in range(count)]


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()


def make_index(model: str, rows: int, folder: Path) -> None:
    from amclr import load
    from amclr.search.parts import FORMAT, PART_ROWS, IndexedImage, write_part

    encoder = load(model)
    encoder.save_pretrained(folder / "model")
    (folder / "parts").mkdir()
    captions = texts(CENTRES, 0)
    centres = encoder.encode_text(captions).numpy()
    draw, parts, thumbnails = np.random.default_rng(0), [], [photograph(k, (160, 120)) for k in range(50)]
    for start in range(0, rows, PART_ROWS):
        numbers = np.arange(start, min(start + PART_ROWS, rows))
        vectors = centres[numbers % CENTRES] + 0.5 / encoder.config.dim**0.5 * draw.normal(
            size=(len(numbers), encoder.config.dim)
        )
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        images = [
            IndexedImage(f"{n:07d}.jpg", f"{n:07d}.jpg", 0, -1, "", (captions[n % CENTRES],), b"")
            for n in numbers.tolist()
        ]
        parts.append(vars(write_part(folder, vectors, images, [thumbnails[n % 50] for n in numbers], "digest")))
    metadata = {"amclr index": FORMAT, "data": "", "dim": encoder.config.dim, "model": "digest", "parts": parts}
    (folder / "index.json").write_text(json.dumps(metadata))


def memory(process: int) -> float:
    """Resident memory of a process in MB."""
    match = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(match[1]) / 1024 if match else float("nan")


class Client(threading.Thread):
    """Sends requests until a deadline, and records their latency."""

    def __init__(self, port: int, seed: int, rows: int, until: float) -> None:
        super().__init__(daemon=True)
        self.port, self.seed, self.rows, self.until = port, seed, rows, until
        self.took: dict[str, list[float]] = collections.defaultdict(list)
        self.errors: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        """Send requests."""
        draw = np.random.default_rng(self.seed)
        queries, upload = texts(5000, self.seed), photograph(self.seed, (1600, 1200))
        form = b"--x\r\nContent-Disposition: form-data; name=image; filename=a.jpg\r\n\r\n" + upload + b"\r\n--x--\r\n"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        number = 0
        while time.monotonic() < self.until:
            number += 1
            kind = str(draw.choice(["text", "similar", "image", "thumbnail"], p=[0.8, 0.1, 0.02, 0.08]))
            row = int(draw.integers(self.rows))
            began = time.perf_counter()
            try:
                if kind == "image":
                    connection.request(
                        "POST", "/search/image", form, {"Content-Type": "multipart/form-data; boundary=x"}
                    )
                else:
                    query = urlencode({"query": queries[number % len(queries)]})
                    connection.request(
                        "GET",
                        {"text": f"/search?{query}", "similar": f"/similar/{row}"}.get(kind, f"/thumbnail/{row}"),
                    )
                answer = connection.getresponse()
                content = answer.read()
                good = answer.status == 200 and (kind == "thumbnail" or len(json.loads(content)["results"]) == 12)
                if not good:
                    self.errors[f"{kind}: {answer.status} {content[:60]!r}"] += 1
            except (OSError, http.client.HTTPException) as error:
                self.errors[f"{kind}: {error!r}"] += 1
                connection.close()
            self.took[kind].append(time.perf_counter() - began)


def report(clients: list[Client], seconds: float, memories: list[float]) -> str:
    errors = sum((c.errors for c in clients), collections.Counter())
    kinds = sorted({kind for c in clients for kind in c.took})
    lines = [f"{'':10} {'requests':>9} {'median':>9} {'95 %':>9} {'slowest':>9}"]
    for kind in [*kinds, "all"]:
        took = np.array([t for c in clients for k in (kinds if kind == "all" else [kind]) for t in c.took[k]])
        middle, most = np.percentile(took, [50, 95])
        lines.append(
            f"{kind:10} {len(took):9,} {1000 * middle:6.0f} ms {1000 * most:6.0f} ms {1000 * took.max():6.0f} ms"
        )
    lines.append(f"{len(took) / seconds:.0f} requests a second, {sum(errors.values())} errors {dict(errors) or ''}")
    lines.append("memory of the server: " + ", ".join(f"{m:.0f} MB" for m in memories) + " (start, middle, end)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run or model folder")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "index"
        folder.mkdir()
        make_index(options.model, options.rows, folder)
        server = subprocess.Popen(
            [sys.executable, "-m", "amclr", "serve", str(folder), "--port", "0", "--rate", "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            print(line, end="", flush=True)
            port = int(re.findall(r":(\d+)", line)[0])
            began = time.monotonic()
            until = began + 60 * options.minutes
            clients = [Client(port, k + 1, options.rows, until) for k in range(options.clients)]
            memories = [memory(server.pid)]
            for client in clients:
                client.start()
            while time.monotonic() < until:
                time.sleep(min(30, max(0.1, until - time.monotonic())))
                if len(memories) == 1 and time.monotonic() > (began + until) / 2:
                    memories.append(memory(server.pid))
            memories.append(memory(server.pid))
            for client in clients:
                client.join(60)
            print(report(clients, time.monotonic() - began, memories))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/metrics")
            metrics = connection.getresponse().read().decode()
            connection.close()
            size, batches = (float(re.search(rf"amclr_batch_queries_{k} (\S+)", metrics)[1]) for k in ("sum", "count"))  # type: ignore[index]
            print(f"queries per batch: {size / batches:.1f} on average; 5-minute load {os.getloadavg()[1]:.1f}")
        finally:
            server.send_signal(signal.SIGTERM)
            print(f"ended with code {server.wait(60)}")


if __name__ == "__main__":
    main()
