"""The state in a checkpoint file: its digest, and files that are damaged in every way."""

from __future__ import annotations

import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amclr.runs.checkpoints import Checkpoints
from amclr.runs.serialization import Damaged, copy_to_cpu, digest, read_state
from amclr.utils.errors import UserError
from tests.runs.states import same, state_of


@pytest.mark.parametrize("before", [None, 1, "1", 1.5, b"1", True, (1, 2), [1], {"a": 1}, torch.ones(2)])
@pytest.mark.parametrize(
    "after",
    [0, "2", 1.25, b"2", False, [1, 2], (1,), {"a": 2}, {"b": 1}, {1: 1}, OrderedDict(a=1), torch.ones(1, 2), torch.ones(2).double(),
     torch.ones(2, dtype=torch.bfloat16), torch.ones(2).requires_grad_(), torch.tensor([1.0, -1.0])],
)  # fmt: skip
def test_the_digest_tells_everything_apart(before: Any, after: Any) -> None:
    assert digest({"x": before}) != digest({"x": after})


def test_the_digest_tells_structure_order_and_small_numbers_apart() -> None:
    norm = nn.BatchNorm1d(3).state_dict()
    other = copy_to_cpu(norm)
    other._metadata[""]["version"] = 1
    for a, b in [
        ([[1], 2], [[1, 2]]), ([], [[]]), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (0.0, -0.0), (1, True), ("", None),
        (norm, dict(norm)), (norm, other), (["a", "b"], ["a/b"]), (torch.empty(0, 3), torch.empty(3, 0)),
    ]:  # fmt: skip
        assert digest(a) != digest(b), (a, b)
    assert digest(norm) == digest(copy_to_cpu(norm))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
def test_the_digest_does_not_depend_on_memory_layout(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randint(0, 2, (6, 5, 4)).to(dtype)
    wanted = digest(values)
    assert digest(values.transpose(0, 2).contiguous().transpose(0, 2)) == wanted
    assert digest(torch.cat([values, values])[6:]) == wanted and digest(values[:3]) != wanted
    mapped = torch.from_file(str(tmp_path / "table"), shared=True, size=values.numel(), dtype=dtype)
    assert digest(mapped.view(6, 5, 4).copy_(values)) == wanted
    monkeypatch.setattr("amclr.runs.serialization.PIECE_BYTES", 7)
    assert digest(values.transpose(0, 2).contiguous().transpose(0, 2)) == wanted
    assert digest(torch.tensor(1).to(dtype)) != digest(torch.tensor([1]).to(dtype))


def flipped(file: Path, copy: Path, positions: Any, wanted: Any) -> dict[str, int]:
    """How often a changed byte was found out, and how often it did not matter."""
    content, draw = file.read_bytes(), random.Random(1)
    counts = {"found": 0, "harmless": 0}
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= draw.randrange(1, 256)
        copy.write_bytes(changed)
        try:
            state = read_state(copy)
        except Damaged:
            counts["found"] += 1
        else:
            assert same(state, wanted), f"byte {position} of {len(content)}"
            counts["harmless"] += 1
    return counts


def test_a_changed_byte_is_found_or_harmless(saved: Checkpoints, tmp_path: Path) -> None:
    saved.save(state_of(1, 3), 1, best=False, keep=1, wait=True)
    file = saved.folder / "last.pt"
    total = file.stat().st_size
    counts = flipped(file, tmp_path / "copy.pt", random.Random(0).sample(range(total), 1500), state_of(1, 3))
    assert counts["found"] > 300, counts


@pytest.mark.slow
def test_every_changed_byte_is_found_or_harmless(saved: Checkpoints, tmp_path: Path) -> None:
    saved.save(state_of(1, 3), 1, best=False, keep=1, wait=True)
    file = saved.folder / "last.pt"
    for _ in range(2):
        flipped(file, tmp_path / "copy.pt", range(file.stat().st_size), state_of(1, 3))
    saved.save(state_of(2, 5000), 2, best=False, keep=1, wait=True)
    positions = [random.Random(2).randrange(file.stat().st_size) for _ in range(500)]
    assert flipped(file, tmp_path / "copy.pt", positions, state_of(2, 5000))["found"] > 450


def test_a_file_cut_off_anywhere_is_damaged(saved: Checkpoints, tmp_path: Path) -> None:
    saved.save(state_of(1, 3), 1, best=False, keep=1, wait=True)
    content = (saved.folder / "last.pt").read_bytes()
    for length in [*range(0, 40), *range(40, len(content), 23), *range(len(content) - 40, len(content))]:
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(Damaged):
            read_state(tmp_path / "cut.pt")


def test_a_payload_is_refused_and_not_executed(
    saved: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Payload:
        def __init__(self, *call: Any) -> None:
            self.call = call

        def __reduce__(self) -> tuple[Any, ...]:
            return self.call[0], self.call[1:]

    saved.save(state_of(1), 1, best=True, keep=5, wait=True)
    saved.save(state_of(2), 2, best=False, keep=5, wait=True)
    for what, protocol, output in [
        (os.mkdir, 2, "Trying to load unsupported GLOBAL posix.mkdir"), (os.mkdir, 4, "Unsupported operand 149"),
        (Path.mkdir, 2, "Unsupported global: GLOBAL"),
    ]:  # fmt: skip
        content = {**state_of(3), "model": Payload(what, tmp_path / "executed")}
        torch.save(content, saved.folder / "step-00000002.pt", pickle_protocol=protocol)
        assert same(saved.load_last(), state_of(1))
        assert f"is damaged (refused: {output}" in capsys.readouterr().err
    (saved.folder / "best.pt").write_bytes((saved.folder / "step-00000002.pt").read_bytes())
    with pytest.raises(UserError, match=r"damaged \(refused: "):
        saved.load_best()
    assert not saved.best_is_intact() and not (tmp_path / "executed").exists()


def test_files_of_the_first_format_have_no_digest(saved: Checkpoints) -> None:
    saved.folder.mkdir()
    torch.save(state_of(4), saved.folder / "last.pt")
    assert same(saved.load_last(), state_of(4)) and same(saved.load_best(), state_of(4))
    for lost in ("sha256", "format"):
        saved.save(state_of(5), 5, best=False, keep=1, wait=True)
        content = torch.load(saved.folder / "last.pt", weights_only=True)
        del content[lost]
        torch.save(content, saved.folder / "step-00000005.pt")
        with pytest.raises(Damaged, match="not what was written"):
            read_state(saved.folder / "step-00000005.pt")
