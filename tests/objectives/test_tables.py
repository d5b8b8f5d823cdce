"""Tables of estimates: the same numbers wherever they are kept, saved in pieces, refused when damaged."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amclr.objectives import VIEWS, build, tables
from tests.objectives.helpers import draw_views, tensors

SAMPLES = {"image": 40, "text": 60}


def steps(objective: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        ids = {of: torch.randint(n, (12,), generator=draw) for of, n in SAMPLES.items()}
        loss, _ = objective(tensors(draw_views(step, batch=12), torch.float32), ids)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("storage", ["host", "disk"])
@pytest.mark.parametrize("settings", [{"name": "ixamclr"}, {"name": "amclr", "estimator": "reference"}], ids=str)
def test_where_they_are_kept_changes_no_bit(storage: str, settings: dict[str, Any], tmp_path: Path) -> None:
    device, other = (
        build(num_samples=SAMPLES, temperature=0.1, storage=s, folder=tmp_path, **settings) for s in ("device", storage)
    )
    assert steps(device, 0, 4) == steps(other, 0, 4)
    first, second = device.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())
    # A state from one place goes on in the other.
    back = build(num_samples=SAMPLES, temperature=0.1, storage=storage, **settings)
    back.load_state_dict(device.state_dict())
    assert steps(back, 4, 6) == steps(device, 4, 6)
    assert not list(tmp_path.iterdir()), "the file of a disk table has no name, and goes with the process"


def test_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved in several pieces from one storage, loaded into another, and going on with the same bits."""
    monkeypatch.setattr(tables, "PIECE_BYTES", 16 * 7)
    whole = build("iamclr", SAMPLES, temperature=0.1)
    steps(whole, 0, 3)
    whole.save_tables(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n for n in names if n.startswith("log_u_image")] == [f"log_u_image-0000{k}.npy" for k in range(6)] + [
        "log_u_image.json"
    ]
    for storage in ("device", "host", "disk"):
        other = build("iamclr", SAMPLES, temperature=0.1, storage=storage)
        other.load_tables(tmp_path)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_damaged_piece_is_named(tmp_path: Path) -> None:
    build("sogclr", SAMPLES).save_tables(tmp_path)
    piece = tmp_path / "log_u_text-00000.npy"
    good = piece.read_bytes()
    for bad in (good[:-5], good[:-1] + bytes([good[-1] ^ 1]), b""):
        piece.write_bytes(bad)
        with pytest.raises(ValueError, match="log_u_text-00000.npy' is damaged: go back to an earlier checkpoint"):
            build("sogclr", SAMPLES).load_tables(tmp_path)
    piece.write_bytes(good)
    with pytest.raises(ValueError, match=re.escape("has shape [40, 1], wanted [41, 1]")):
        build("sogclr", {"image": 41, "text": 60}).load_tables(tmp_path)
    with pytest.raises(ValueError, match="holds no table 'log_u_image'"):
        build("sogclr", SAMPLES).load_tables(tmp_path / "nowhere")


def test_a_piece_holds_numbers_alone(tmp_path: Path) -> None:
    """A pickle in the place of a piece is not opened."""
    build("sogclr", SAMPLES).save_tables(tmp_path)
    mark = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(mark),)

    np.save(tmp_path / "log_u_text-00000.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"):
        build("sogclr", SAMPLES).load_tables(tmp_path)
    assert not mark.exists()


def test_a_state_of_another_size_is_refused() -> None:
    state = build("sogclr", SAMPLES).state_dict()
    for storage in ("device", "disk"):
        with pytest.raises(RuntimeError, match="shape"):
            build("sogclr", 7, storage=storage).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key.*log_u_text"):
        build("sogclr", SAMPLES, storage="disk").load_state_dict({k: v for k, v in state.items() if "text" not in k})


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tables, "free_memory", lambda: 10_000)
    assert build("amclr", 100).log_u_image.storage == "device"  # 2 x 100 x 4 x 4 bytes
    assert build("amclr", 1000).log_u_image.storage == "disk"
    assert build("clip", 10**9).settings.temperature_mode == "learnable", (
        "a mini-batch objective has no tables to find room for"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 8_000}))
    assert [tables.choose_storage(size) for size in (1000, 4000, 9000)] == ["device", "host", "disk"]


def test_the_index_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving interrupted half way leaves no index, so that nothing is taken for whole."""
    monkeypatch.setattr(tables, "PIECE_BYTES", 16)
    written: list[Path] = []
    real = tables.written

    def stop(file: Path) -> Any:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(file)
        return real(file)

    monkeypatch.setattr(tables, "written", stop)
    with pytest.raises(OSError, match="No space left"):
        build("sogclr", SAMPLES).save_tables(tmp_path)
    assert not list(tmp_path.glob("*.json"))
    with pytest.raises(ValueError, match="holds no table"):
        build("sogclr", SAMPLES).load_tables(tmp_path)


def test_saved_over_an_older_save_and_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New estimates of images beside old ones of texts are not taken for whole."""
    objective = build("sogclr", SAMPLES)
    objective.save_tables(tmp_path)
    real = tables.Table.save

    def stop(table: Any, folder: Path, name: str) -> None:
        if name == "log_u_text":
            raise KeyboardInterrupt
        real(table, folder, name)

    monkeypatch.setattr(tables.Table, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        objective.save_tables(tmp_path)
    with pytest.raises(ValueError, match="holds no table 'log_u_text'"):
        build("sogclr", SAMPLES).load_tables(tmp_path)


def test_nothing_is_taken_up_if_a_piece_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PIECE_BYTES", 64)
    filled = build("sogclr", SAMPLES)
    filled.log_u_image.values.fill_(1.0)
    filled.save_tables(tmp_path)
    (tmp_path / "log_u_image-00002.npy").write_bytes(b"")
    other = build("sogclr", SAMPLES)
    with pytest.raises(ValueError, match="log_u_image-00002.npy' is damaged"):
        other.load_tables(tmp_path)
    assert not bool(torch.isfinite(other.log_u_image.values).any())


def test_half_precision_is_not_for_tables() -> None:
    objective = build("sogclr", SAMPLES).to(torch.bfloat16)
    assert objective.log_u_image.values.dtype == torch.float32
    assert build("sogclr", SAMPLES).double().log_u_image.values.dtype == torch.float64


def test_the_index_says_what_is_there(tmp_path: Path) -> None:
    build("sogclr", SAMPLES).save_tables(tmp_path)
    index = json.loads((tmp_path / "log_u_image.json").read_text())
    assert index["shape"] == [40, 1] and sum(p["rows"] for p in index["pieces"]) == 40


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clip", {}), ("ixamclr", {}), ("ixamclr", {"estimator": "reference"}), ("ixamclr", {"storage": "disk"}),
        ("amclr", {"backend": "triton"}), ("amclr", {"gamma_schedule": "adaptive"}),
        ("amclr", {"gamma_schedule": "adaptive", "backend": "triton"}),
        ("amclr", {"queue": 9}), ("clip", {"queue": 4}),
    ],
)  # fmt: skip
def test_a_step_can_be_undone(name: str, settings: dict[str, Any]) -> None:
    """Tables, temperatures included, are as before; also where samples stand twice; and only the last step is."""
    objective = build(name, 12, temperature=0.1, **settings)
    objective.remember = True
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        views = {v: torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1) for v in VIEWS}
        objective(views, torch.tensor([0, 1, 2, 3, 3, 7]))

    step()
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    step()
    after = {k: v.clone() for k, v in objective.state_dict().items()}
    objective.undo()
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())
    if name != "clip" or settings:
        assert not all(torch.equal(v, before[k]) for k, v in after.items())
    objective.undo()
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


def test_rows_of_other_samples_and_the_queue() -> None:
    """Tables are taken over sample by sample; what is queued, whose ids are the former samples', is not."""
    before, after = build("sogclr", 6, temperature=0.1, queue=9), build("sogclr", 4, temperature=0.1, queue=9)
    generator = torch.Generator().manual_seed(0)
    views = {v: torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1) for v in VIEWS}
    before(views, torch.arange(6))
    after.load_rows(before.state_dict(), torch.tensor([5, -1, 0, 2]))
    found = after.get_submodule("log_u_image").values
    assert torch.equal(found[[0, 2, 3]], before.get_submodule("log_u_image").values[[5, 0, 2]])
    assert bool(torch.isinf(found[1])) and len(after.queue) == 0  # type: ignore[arg-type]
    after(views, torch.tensor([0, 1, 2, 3, 0, 1]))
    assert len(after.queue) == 6  # type: ignore[arg-type]
