"""A scan finds bad images, resumes after a kill, and decodes nothing twice."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from amclr.data.images.scan import scan
from tests.data.encoded import encoded
from tests.data.manifest.test_loading import read


def test_a_scan_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for k in range(900):
        content = b"" if k % 100 == 7 else encoded(Image.new("RGB", (300, 200), (k % 256, 0, 0)))
        (images / f"{k:03d}.jpg").write_bytes(content)
    code = (
        "import sys; from pathlib import Path; from amclr.data.images.decode import Location; from amclr.data.images.scan import scan\n"
        "places = [Location(str(f)) for f in sorted(Path(sys.argv[1]).iterdir())]\n"
        "print(*(Path(p.file).name for p, v in scan(places, 32, Path(sys.argv[2]), progress=False).items() if v.reason))\n"
    )
    verdicts = tmp_path / "verdicts.jsonl"
    command = [sys.executable, "-c", code, str(images), str(verdicts)]
    scanning = subprocess.Popen(command)
    while not (verdicts.is_file() and verdicts.stat().st_size):
        time.sleep(0.002)
    scanning.kill()
    scanning.wait()
    with verdicts.open("ab") as handle:
        handle.write(b'["half of a li')
    done = verdicts.read_text().count("\n")
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert out == [f"{k:03d}.jpg" for k in range(7, 900, 100)]
    rows = [line for line in verdicts.read_text().splitlines() if line.endswith("]")]
    assert 256 <= done <= 900 and len(rows) == 900, "every image was decoded once"


def test_scan_takes_its_verdicts_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [s.image for s in read(folder).samples]
    Path(paths[0].file).write_bytes(b"x")
    first = scan(paths, 32, folder / "verdicts.json", progress=False)
    monkeypatch.setattr("amclr.data.images.scan.read_image", lambda *_: pytest.fail("decoded again"))
    assert scan(paths, 32, folder / "verdicts.json", progress=False) == first
    assert [p for p, v in first.items() if v.reason] == paths[:1]
