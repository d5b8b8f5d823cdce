"""Images are decoded as Pillow would, bad ones are refused with a reason, and nothing hostile is run."""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amclr.data.images import decode
from amclr.data.images.decode import BadImage, Location, read_image
from amclr.data.images.scan import scan
from tests.data.encoded import jpeg


def test_images_are_reduced_as_pillow_would() -> None:
    content = jpeg(5, (150, 100))
    wanted = Image.open(io.BytesIO(content)).resize((96, 64), Image.Resampling.BICUBIC)
    made = read_image(content, 32)
    assert made.shape == (3, 64, 96)
    assert (made.int() - torch.from_numpy(np.array(wanted)).permute(2, 0, 1).int()).abs().max() <= 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_jpeg_that_is_cut_off_is_refused(share: float) -> None:
    for size in ((60, 44), (900, 700)):
        content = jpeg(1, size)
        with pytest.raises(BadImage, match="cannot be decoded"):
            read_image(content[: int(share * len(content))], 24)


def test_no_image_runs_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to `gs`, whatever the file is called."""
    told = tmp_path / "told"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\necho run >> '{told}'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once in a process
    hostile = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(hostile)
    with pytest.raises(OSError):
        Image.open(tmp_path / "a.jpg").load()
    assert told.read_text().startswith("run"), "Pillow alone does run it"
    told.unlink()
    for source in (hostile, tmp_path / "a.jpg"):
        with pytest.raises(BadImage, match="cannot be decoded: cannot identify image file"):
            read_image(source, 24)
    assert not told.exists()


@pytest.mark.parametrize("kind", decode.KINDS)
def test_every_kind_that_is_named_is_read(kind: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 10, 10)).save(out, kind)
    assert read_image(out.getvalue(), 24).shape == (3, 20, 30)


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.jpg")
    with pytest.raises(BadImage, match="not a regular file"):
        read_image(tmp_path / "f.jpg", 24)


def test_a_line_of_pixels_is_refused() -> None:
    """Its shorter side at 24 pixels, it would be 24 million pixels long."""
    out = io.BytesIO()
    Image.new("1", (1_000_000, 1)).save(out, "PNG")
    assert len(out.getvalue()) < 1000
    with pytest.raises(BadImage, match="too narrow: 1000000 x 1 pixels, one side over 1000 times the other"):
        read_image(out.getvalue(), 24)


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And small ones beside them, drafts of large ones included."""
    monkeypatch.setattr(decode, "LARGE_PIXELS", 90 * 90)
    monkeypatch.setattr(decode.os, "cpu_count", lambda: 8)
    now: dict[bool, int] = {True: 0, False: 0}
    most = dict(now)
    lock, real = threading.Lock(), decode._to_rgb

    def watched(image: Image.Image) -> Image.Image:
        large = image.size[0] * image.size[1] > 90 * 90 or image.info.get("progressive", 0) == 1
        with lock:
            now[large] += 1
            most[large] = max(most[large], now[large])
        time.sleep(0.02)
        with lock:
            now[large] -= 1
        return real(image)

    monkeypatch.setattr(decode, "_to_rgb", watched)
    found = []
    for k in range(32):
        file = tmp_path / f"{k}.png"
        if k % 4 == 0:
            Image.new("RGBA", (100, 100), (k, 0, 0, 128)).save(file)
        else:
            file.write_bytes(jpeg(k, (400, 400) if k % 4 == 1 else (40, 40), progressive=k % 8 == 1))
        found.append(Location(str(file)))
    assert not any(v.reason for v in scan(found, 20, progress=False).values())
    assert most[True] == 1 and most[False] > 1


def deep(mode: str) -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16)).convert(mode)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1)))
    image = deep("I;16") if mode == "I;16" else ramp.convert("RGB").convert(mode) if mode != "F" else ramp.convert("F")
    if mode == "I":
        image = ramp.convert("I")
    out = read_image(image, 32)
    assert out.shape == (3, 40, 40) and out.dtype.is_floating_point is False
    assert int(out.max()) > 240 and int(out.min()) < 15


def test_images_are_turned_upright_and_made_smaller() -> None:
    wide = Image.new("RGB", (400, 200), "red")
    exif = wide.getexif()
    exif[0x0112] = 6
    out = io.BytesIO()
    wide.save(out, "JPEG", exif=exif)
    assert read_image(out.getvalue(), 32).shape == (3, 128, 64)
    with pytest.raises(BadImage, match="no such image"):
        read_image("absent.jpg", 32)


def test_transparent_is_white_not_black() -> None:
    assert int(read_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8).min()) == 255
