"""Shared inputs: a tiny captioned image folder made here, and where the real data is, if it is."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter. It looks at this when it is first imported, by whatever test.
    os.environ["TRITON_INTERPRET"] = "1"
# No test asks the Hub, in this process or another. Its library, too, looks at this once.
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script that starts the tests with `&` has them ignore Ctrl-C, and some send it to themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)

REAL = Path(os.environ.get("AMCLR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
BEGUN = time.monotonic()
COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 210), "yellow": (230, 210, 50)}

needs_real_data = pytest.mark.skipif(
    not (REAL / "flickr8k" / "captions.txt").is_file(),
    reason=f"no Flickr8k under {REAL}: set AMCLR_TEST_DATA to a folder with flickr8k/, cifar10/ and tiny-imagenet/",
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin no slow test after AMCLR_SLOW_MINUTES, so that what has a limit on its time ends within it."""
    minutes = float(os.environ.get("AMCLR_SLOW_MINUTES", "inf"))
    if item.get_closest_marker("slow") and time.monotonic() - BEGUN > 60 * minutes:
        pytest.skip(f"AMCLR_SLOW_MINUTES={minutes:g} were over before it began")


def paint(colour: str, index: int, size: int = 40) -> Image.Image:
    """A noisy patch of a colour on grey, another one for every index."""
    draw = np.random.default_rng(index)
    pixels = draw.integers(90, 140, (size, size, 3))
    x, y = draw.integers(4, size - 24, 2)
    pixels[y : y + 20, x : x + 20] = np.array(COLOURS[colour]) + draw.integers(-10, 10, (20, 20, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_folder(root: Path, images: int = 40, captions: int = 2, lists: bool = True) -> Path:
    """A data set in the Kaggle Flickr8k layout: coloured patches and captions that name the colour."""
    (root / "Images").mkdir(parents=True)
    names = []
    with (root / "captions.txt").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "caption"])
        for i in range(images):
            colour = list(COLOURS)[i % len(COLOURS)]
            name = f"{i:03d}.png"
            names.append(name)
            paint(colour, i).save(root / "Images" / name)
            for k in range(captions):
                writer.writerow([name, f"{('a', 'one', 'this')[k % 3]} {colour} patch number {i}"])
    if lists:
        held = max(2, images // 5)
        (root / "train.txt").write_text("\n".join(names[held:]) + "\n")
        (root / "val.txt").write_text("\n".join(names[:held]) + "\n")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small captioned image folder with train and val lists."""
    return make_folder(tmp_path / "patches")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("AMCLR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave no curves and no gallery, which take longer than small runs do, but for tests marked `draws`."""
    if request.node.get_closest_marker("draws"):
        return
    for module in ("amclr.training.validation", "amclr.evaluation.run"):
        monkeypatch.setattr(f"{module}.draw_gallery", lambda *_: None)
    monkeypatch.setattr("amclr.utils.figures.curves", lambda *_: None)


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process, in an empty folder: a new one takes seconds to import all there is.

    Libraries that look at the environment when they are imported have done so already.
    """

    def run(*arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
        from amclr import cli

        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for name, value in {"OMP_NUM_THREADS": 1, **environment}.items():
                patch.setenv(name, str(value))
            try:
                code = cli.main([*map(str, arguments)])
            except SystemExit as stop:  # after --help
                code = int(stop.code or 0)
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return run


@pytest.fixture
def amclr(tmp_path: Path) -> Command:
    """Run the command line as a user would, in a process of its own: for whole passes, and how a process ends."""

    def run(*arguments: object, timeout: float = 300, **environment: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "amclr", *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}},
        )

    return run


SMALL = (
    "--recipe", "scratch", "--model.image_size", "32", "--model.dim", "32", "--batch_size", "8", "--epochs", "2",
    "--accelerator", "cpu",
)  # fmt: skip
"""Options of a training run of seconds on the small folder."""
