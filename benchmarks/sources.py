"""Time and memory of reading a large data set: tars that are indexed first, and tars with a cached index.

    python -m benchmarks.sources [--samples 200000]

The images are not decoded, so their content is arbitrary.
"""

from __future__ import annotations

import argparse
import io
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

READ = """
import resource, sys, time
from pathlib import Path
from amclr.config.schema import Config
from amclr.data import manifest

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before, start = memory(), time.perf_counter()
samples = manifest.load(Config(data=sys.argv[1]), Path(sys.argv[2]), progress=False).samples
seconds, count = time.perf_counter() - start, len(samples)
print(f"| {sys.argv[3]} | {count} | {seconds:.1f} s | {1e6 * seconds / count:.1f} us | {1024 * (memory() - before) / count:.2f} kB |")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    options = parser.parse_args()
    draw = random.Random(0)
    words = [f"word{k}" for k in range(5000)]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shards"
        data.mkdir()
        for shard in range(-(-options.samples // 10_000)):
            with tarfile.open(data / f"{shard:06d}.tar", "w") as tar:
                for k in range(min(10_000, options.samples - shard * 10_000)):
                    caption = " ".join(draw.choices(words, k=11)).encode()
                    for suffix, content in (("jpg", bytes([65 + k % 26]) * 600), ("txt", caption)):
                        member = tarfile.TarInfo(f"{shard:06d}{k:06d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        print("| tars | samples | time | per sample | memory per sample |\n|---|---|---|---|---|", flush=True)
        for what in ("indexed now", "indexed before"):
            subprocess.run([sys.executable, "-c", READ, str(data), str(Path(folder) / "cache"), what], check=True)


if __name__ == "__main__":
    main()
