"""The Triton kernels against the eager blocks in float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from amclr.objectives import build  # noqa: E402
from amclr.objectives.backends import BlockInputs  # noqa: E402
from amclr.objectives.backends import triton_kernels as kernels  # noqa: E402
from amclr.objectives.backends.torch_tiles import TorchBlocks  # noqa: E402
from amclr.objectives.backends.triton_kernels import TritonBlocks  # noqa: E402
from amclr.objectives.layout import layouts  # noqa: E402
from amclr.objectives.positives import Positives  # noqa: E402

VIEWS = ("image", "image_aug", "text", "text_aug")
# Relative errors of the gradient, by the type of the features in the products.
TOLERANCES = {"auto": 1e-5, "tf32": 1e-5 if DEVICE == "cpu" else 2e-2, "float16": 2e-2, "bfloat16": 1e-1}


def draw(seed: int, batch: int, dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = {v: F.normalize(torch.randn(batch, dim, generator=generator), dim=-1) for v in VIEWS}
    return {v: x.to(DEVICE, dtype).requires_grad_() for v, x in rows.items()}


def run(
    backend: str, name: str, ids: Any, batch: int, dim: int, matmul_dtype: str, dtype: torch.dtype, diagnose: bool = False,
    groups: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    objective = build(name, 2 * batch, backend=backend, matmul_dtype=matmul_dtype, **settings).to(DEVICE)
    objective.diagnose = diagnose
    for step in range(2):  # the second finds what the first has left in the tables
        views = draw(step, batch, dim, dtype)
        shown = groups and {v: g.to(DEVICE) for v, g in groups.items()}
        loss, metrics = objective(views, {k: i.to(DEVICE) for k, i in ids.items()}, shown)
        loss.backward()
    return metrics, {v: x.grad for v, x in views.items() if x.grad is not None}, objective.state_dict()


def unless_interpreted(*case: Any, fast: bool) -> Any:
    """A case that is among the fast ones on a GPU, and in Triton's interpreter, which takes seconds, if it is chosen."""
    return pytest.param(*case, marks=() if fast or DEVICE == "cuda" else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "matmul_dtype", "batch", "dim", "tau", "diagnose"),
    # Any two of name, products and sizes meet in a fast case.
    [
        unless_interpreted(name, matmul_dtype, *sizes, fast=(n + p + s) % 2 == 0)
        for n, name in enumerate(["sogclr", "amclr", "xamclr", "ixamclr", "clip"])
        for p, matmul_dtype in enumerate(TOLERANCES)
        for s, sizes in enumerate([(70, 20, 0.1, False), (16, 140, 0.03, True)])
    ],
)
def test_kernels_equal_the_blocks(
    name: str, matmul_dtype: str, batch: int, dim: int, tau: float, diagnose: bool
) -> None:
    """Loss, metrics, gradients and tables after some steps, with sizes that fill no tile and ids that stand twice.

    With diagnostics the numbers per anchor are worked out by torch, without them in the kernels.
    """
    ids = {"image": torch.arange(batch), "text": torch.arange(batch)}
    ids["image"][3], ids["text"][1], ids["text"][2] = 5, 7, 7
    given = run("triton", name, ids, batch, dim, matmul_dtype, torch.float32, diagnose, temperature=tau)
    exact = run("eager", name, ids, batch, dim, "auto", torch.float64, diagnose, temperature=tau)
    tolerance = TOLERANCES[matmul_dtype]
    assert set(given[1]) == set(exact[1])
    for view, gradient in given[1].items():
        error = float((gradient.double() - exact[1][view]).norm() / exact[1][view].norm())
        assert error < tolerance, (view, error)
    for key, value in exact[0].items():
        torch.testing.assert_close(
            given[0][key].double(), value.double(), rtol=10 * tolerance, atol=10 * tolerance, msg=key
        )
    torch.testing.assert_close(given[2], exact[2], rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", ["amclr", "clip"])
def test_a_queue_beside_the_kernels(name: str) -> None:
    """The batch in the kernels, the queue in torch, labels on the CPU; who is queued already is not its own negative."""
    groups = {"image": torch.arange(24) % 9}  # of one view alone
    ids = {"image": torch.arange(24), "text": torch.arange(24)}
    given = run("triton", name, ids, 24, 20, "auto", torch.float32, groups=groups, queue=40, temperature=0.1)
    exact = run("eager", name, ids, 24, 20, "auto", torch.float64, groups=groups, queue=40, temperature=0.1)
    for view, gradient in given[1].items():
        error = float((gradient.double() - exact[1][view]).norm() / exact[1][view].norm())
        assert error < TOLERANCES["auto"], (view, error)
    for found, expected in ((given[0], exact[0]), (given[2], exact[2])):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize(
    ("name", "views", "twice"),
    [
        unless_interpreted(name, *case, fast=(n + c) % 2 == 1)
        for n, name in enumerate(["amclr", "ixamclr"])
        for c, case in enumerate([(("image",), False), (("text",), True), (("image", "text", "text_aug"), False)])
    ],
)
def test_groups_in_the_kernels(name: str, views: tuple[str, ...], twice: bool) -> None:
    """Positives without a shared table row: loss, gradients and tables of the blocks, ids repeated or not."""
    groups = {"image": torch.arange(70) // 3, "text": torch.arange(70) % 33 - 4, "text_aug": 40 - torch.arange(70) % 45}
    ids = torch.arange(70) // (2 if twice else 1)
    given, exact = (
        run(backend, name, {"image": ids, "text": ids}, 70, 20, "auto", dtype, False,
            {v: groups[v] for v in views}, temperature=0.1)
        for backend, dtype in (("triton", torch.float32), ("eager", torch.float64))
    )  # fmt: skip
    for view, gradient in given[1].items():
        assert float((gradient.double() - exact[1][view]).norm() / exact[1][view].norm()) < 1e-5
    torch.testing.assert_close(given[0]["loss"].double(), exact[0]["loss"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given[2], exact[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_views_are_taken_as_they_are(dtype: torch.dtype) -> None:
    ids = {"image": torch.arange(40), "text": torch.arange(40)}
    given = run("triton", "amclr", ids, 40, 24, "auto", dtype, temperature=0.1)
    expected = run("eager", "amclr", ids, 40, 24, "auto", dtype, temperature=0.1)
    torch.testing.assert_close(given[0]["loss"], expected[0]["loss"], rtol=2e-3, atol=2e-3)
    assert all(g.dtype == dtype for g in given[1].values())


@pytest.mark.parametrize("mine", [slice(0, 17), slice(17, 40)])
def test_rows_of_one_process(mine: slice) -> None:
    """With other processes' rows as candidates only: what the eager blocks give for the same rows."""
    views = [x.detach() for x in draw(0, 40, 12, torch.float32).values()]
    ids = torch.arange(40, device=DEVICE) // 2
    objective = build("xamclr", 40)
    positives = Positives.of((ids,), ids.device)
    results = []
    grids = layouts(objective.terms, objective.parts.views, False)
    every = [views[VIEWS.index(v)] for v in objective.parts.views]
    for backend in (TorchBlocks, TritonBlocks):
        blocks = backend(BlockInputs(every, mine, grids, 0.1, positives, "auto", 2.0))
        sums, positive = blocks.log_sums()
        offsets = torch.linspace(-2, 4, 12 * 40, device=DEVICE).view(12, 40)
        own = torch.linspace(0, 1, 12 * 40, device=DEVICE).view(12, 40)
        gradient = torch.empty(4, mine.stop - mine.start, 12, device=DEVICE)
        pulls = blocks.gradients(offsets, own, gradient, set(), True)
        results.append((sums, positive, gradient, pulls))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["amclr", "clip"])
def test_ids_that_are_a_column_of_a_table(name: str) -> None:
    """A stride between ids must not send a kernel to other rows."""
    table = torch.arange(60, device=DEVICE).view(20, 3)
    views = draw(0, 20, 8, torch.float32)
    strided, packed = (build(name, 60, backend="triton").to(DEVICE) for _ in range(2))
    a, _ = strided(views, table[:, 1])
    b, _ = packed(views, table[:, 1].clone())
    assert float(a.detach()) == float(b.detach())
    assert all(torch.equal(v, packed.state_dict()[k]) for k, v in strided.state_dict().items())


@pytest.mark.parametrize("twice", [False, True])
def test_nan_shows_in_the_loss_and_spares_the_estimates(twice: bool) -> None:
    objective = build("amclr", 20, backend="triton", validate=False, temperature=0.1).to(DEVICE)
    ids = torch.arange(20, device=DEVICE) // (2 if twice else 1)
    objective(draw(0, 20, 8, torch.float32), ids)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    views = {k: v.detach().clone() for k, v in draw(1, 20, 8, torch.float32).items()}
    views["image"][3] = torch.nan
    assert bool(objective(views, ids)[0].isnan())
    after = objective.state_dict()
    assert not any(bool(v.isnan().any()) for v in after.values())
    assert any(not torch.equal(v, before[k]) for k, v in after.items()), "what is sound has learned"


@pytest.mark.parametrize(("name", "settings"), [("amclr", {"gamma": 0.001}), ("clip", {"temperature_mode": "fixed"})])
def test_float16_products_do_not_overflow(name: str, settings: dict[str, Any]) -> None:
    """Estimates that a batch exceeds a thousandfold; a softmax at the lowest temperature."""
    ids = {"image": torch.arange(16), "text": torch.arange(16)}
    objective = build(name, 16, backend="triton", matmul_dtype="float16", temperature=0.005, **settings).to(DEVICE)
    near = {
        v: F.normalize(x.detach() * 0.3 + 1, dim=-1).requires_grad_() for v, x in draw(0, 16, 24, torch.float32).items()
    }
    far = draw(1, 16, 24, torch.float32)
    for views in (near, far):
        loss, _ = objective(views, {k: i.to(DEVICE) for k, i in ids.items()})
        loss.backward()
    assert all(bool(torch.isfinite(v.grad).all()) for v in far.values() if v.grad is not None)


def test_a_batch_without_negatives_is_refused() -> None:
    objective = build("amclr", 20, backend="triton", validate=True).to(DEVICE)
    with pytest.raises(ValueError, match="no row of the batch has a negative"):
        objective(draw(0, 6, 8, torch.float32), torch.zeros(6, dtype=torch.int64, device=DEVICE))


def test_same_bits_twice() -> None:
    ids = {"image": torch.arange(70), "text": torch.arange(70)}
    first, second = (run("triton", "xamclr", ids, 70, 20, "auto", torch.float32, temperature=0.05) for _ in range(2))
    assert all(torch.equal(g, second[1][v]) for v, g in first[1].items())
    assert all(torch.equal(t, second[2][k]) for k, t in first[2].items())


class Calls(TorchDispatchMode):
    """The operations called, and what they made, but for those that only look at a tensor in another way."""

    LOOKS = ("view", "slice", "select", "alias", "detach", "permute", "transpose", "unsqueeze", "unbind", "expand", "t.", "empty",
             "_unsafe_view", "squeeze", "promote_types", "lift_fresh")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        found = func(*args, **(kwargs or {}))
        if not name.startswith(self.LOOKS):
            self.names.append(name)
            self.made.append(found)
        return found


class Launches:
    """A kernel that is counted as one call, whatever the interpreter calls inside it."""

    def __init__(self, kernel: Any, calls: Calls) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            names, made = list(self.calls.names), list(self.calls.made)
            self.kernel[grid](*args, **kwargs)
            self.calls.names, self.calls.made = [*names, "kernel"], made

        return launch


@pytest.mark.parametrize(("name", "most"), [("sogclr", 11), ("amclr", 11), ("xamclr", 15), ("clip", 34)])
def test_a_step_is_a_handful_of_launches_and_waits_for_none(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward. No value is read back, so that a step can be captured in a CUDA graph."""
    if DEVICE == "cpu":  # what costs nothing on the CPU is not done on a GPU
        monkeypatch.setattr(
            Positives, "of", classmethod(lambda cls, ids, device, groups: cls(len(ids[0]), ((ids[0], ids[0]),), False))
        )
    objective = build(name, 40, backend="triton", validate=False).to(DEVICE)
    views, ids = draw(0, 32, 16, torch.float32), torch.arange(32, device=DEVICE)
    objective(views, ids)
    calls = Calls()
    for kernel in ("_log_sums", "_estimate", "_store", "_gradients"):
        monkeypatch.setattr(kernels, kernel, Launches(getattr(kernels, kernel), calls))
    with calls:
        objective(views, ids)[0].backward()
    waits = [
        n for n in calls.names if n.startswith(("_local_scalar_dense", "nonzero", "unique", "item", "masked_select"))
    ]
    assert not waits, waits
    assert len(calls.names) <= most, calls.names


@pytest.mark.parametrize("temperature", ["fixed", "learnable"])
def test_half_precision_views_are_not_copied_to_float32(temperature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At B = 32,768 and D = 512 four such copies would be 268 MB."""
    views, ids = draw(0, 40, 32, torch.float16), torch.arange(40, device=DEVICE)
    objective = build("amclr", 40, backend="triton", validate=False, temperature_mode=temperature).to(DEVICE)
    calls = Calls()
    for kernel in ("_log_sums", "_estimate", "_store", "_gradients"):
        monkeypatch.setattr(kernels, kernel, Launches(getattr(kernels, kernel), calls))
    with calls:
        loss, _ = objective(views, ids)
    large = [x.dtype for x in calls.made if isinstance(x, Tensor) and x.numel() >= 40 * 32]
    if temperature == "fixed":
        assert large == [torch.float16], large  # the views, stacked
    loss.backward()
    exact = build("amclr", 40, backend="eager", temperature_mode=temperature)
    same = {k: v.detach().cpu().double().requires_grad_() for k, v in views.items()}
    expected, _ = exact(same, torch.arange(40))
    expected.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=2e-3, atol=2e-3)
    for v, x in views.items():
        assert x.grad is not None and x.grad.dtype == torch.float16
        assert float((x.grad.cpu().double() - same[v].grad).norm() / same[v].grad.norm()) < 5e-3  # type: ignore[union-attr]
    if temperature == "learnable":
        torch.testing.assert_close(
            objective.log_temperature.grad.cpu(), exact.log_temperature.grad, rtol=5e-3, atol=5e-3
        )


@pytest.mark.parametrize(
    ("dtype", "settings", "count", "expected"),
    [
        (torch.float16, {}, 1, True),
        (torch.bfloat16, {"averaged": True}, 64, True),
        (torch.float16, {"averaged": True}, 1, True),
        (torch.float16, {"averaged": True}, 64, False),  # would be rounded before it is multiplied by 64
        (torch.float16, {"matmul_dtype": "float32"}, 1, False),
        (torch.float16, {"estimator": "reference"}, 1, False),  # works with the views in torch
    ],
)
def test_when_halves_are_taken_as_they_are(
    dtype: torch.dtype, settings: dict[str, Any], count: int, expected: bool
) -> None:
    objective = build("amclr", 40, backend="triton", **{k: x for k, x in settings.items() if k != "averaged"}).to(
        DEVICE
    )
    views, multiplied = draw(0, 8, 16, dtype), settings.get("averaged", False) and count > 1
    assert objective.parts.takes_halves([*views.values()], dtype, False, multiplied) == expected
    mixed = [*(views | {"text": views["text"].float()}).values()]
    assert not objective.parts.takes_halves(mixed, torch.float32, False, False)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_step_in_a_cuda_graph() -> None:
    objective, plain = (build("amclr", 40, backend="triton", validate=False).to(DEVICE) for _ in range(2))
    views, ids = draw(0, 32, 16, torch.float32), torch.arange(32, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            objective(views, ids)[0].backward()
            plain(views, ids)[0].backward()
    torch.cuda.current_stream().wait_stream(side)
    for v in views.values():
        v.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = objective(views, ids)
        loss.backward()
    graph.replay()
    captured = {k: v.grad.clone() for k, v in views.items()}
    for v in views.values():
        v.grad = None
    expected, _ = plain(views, ids)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(captured, {k: v.grad for k, v in views.items()})


SMALL_KERNELS = """
from amclr.objectives.backends import triton_kernels as k
from benchmarks.kernels import compiled

block = dict(IDS=2, BLOCK=k.BLOCK)
for GLOBAL, UNIQUE in ((1, 0), (1, 1), (0, 1)):
    made = compiled(k._estimate, block | dict(GLOBAL=GLOBAL, UNIQUE=UNIQUE, CANDIDATES=k.CANDIDATES), CAPABILITY)
    assert made.asm["cubin"]
assert compiled(k._store, block, CAPABILITY).asm["cubin"]
# The passes with positives by groups too, and the sums that temperatures need.
for kind, features in TYPES:
    for kernel, tile, more in zip((k._log_sums, k._gradients), k.SMALL[kind], ({}, dict(PARTNERS=3, SLOPES=True))):
        constants = tile.sizes | more | dict(MATCHES=2, PRECISION="tf32" if kind == "tf32" else "ieee")
        made = compiled(kernel, constants, CAPABILITY, features, **tile.launch)
        assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024, (kernel, made.metadata.shared)
print("compiled")
"""


def without_interpreter(tmp_path: Path, *command: str) -> str:
    """What a Python command prints, with Triton as it is where there is a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("capability", "kinds", "dims"),
    [
        (90, "half", "256"),
        *(pytest.param(c, "half,tf32,ieee", "256,512", marks=pytest.mark.slow) for c in (80, 90, 100)),
    ],
    ids=["90", "80-all", "90-all", "100-all"],
)
def test_kernels_compile_for_a_gpu(capability: int, kinds: str, dims: str, tmp_path: Path) -> None:
    """To machine code, for which no GPU is needed: with the matrix units' instructions, in memory that there is."""
    command = ["-m", "benchmarks.kernels", "--capability", str(capability), "--kinds", kinds, "--dims", dims]
    _, header, _, *rows = without_interpreter(tmp_path, *command).splitlines()
    names = [name.strip() for name in header.strip("|").split("|")]
    found = [dict(zip(names, (v.strip() for v in row.strip("|").split("|")), strict=True)) for row in rows]
    assert len(found) >= 6 * len(dims.split(","))
    for row in found:
        # What every GPU since 2020 has for the warps of a program; H100 and A100 for tiles that ask for it.
        assert int(row["shared KiB"]) <= ({90: 227, 80: 163}[capability] if "whole" in row["tile"] else 99), row
        if capability != 100:
            matrix = "HGMMA" if capability == 90 else "HMMA"
            assert (int(row[matrix]) > 0) == (row["products of"] != "ieee"), row
        # Numbers of a tile that do not fit in the registers go to memory and back: a few may, of hundreds.
        assert int(row["stack bytes"]) <= 512, row


TYPES = (("tf32", "*fp32"), ("ieee", "*fp32"), ("half", "*fp16"), ("half", "*bf16"))


@pytest.mark.parametrize(
    ("capability", "types"),
    [(90, TYPES[:1]), *(pytest.param(c, TYPES, marks=pytest.mark.slow) for c in (90, 80))],
    ids=["90", "90-all", "80-all"],
)
def test_every_step_compiles_for_a_gpu(capability: int, types: tuple[tuple[str, str], ...], tmp_path: Path) -> None:
    """What stands between the passes too, within the shared memory of every GPU since 2020."""
    code = SMALL_KERNELS.replace("CAPABILITY", str(capability)).replace("TYPES", repr(types))
    assert without_interpreter(tmp_path, "-c", code) == "compiled\n"


@pytest.mark.parametrize(
    ("processors", "shared", "kind", "dim", "rows", "expected"),
    [
        (132, 232448, "half", 256, 1024, "small"),  # H100, H200: too few programs for larger tiles
        (132, 232448, "half", 256, 8192, "whole"),
        (132, 232448, "half", 512, 8192, "whole"),
        (132, 232448, "half", 768, 8192, "large"),
        (132, 232448, "tf32", 256, 8192, "large"),
        (108, 166912, "half", 256, 8192, "whole"),  # A100
        (108, 166912, "half", 512, 8192, "large"),
        (128, 101376, "half", 512, 8192, "large"),  # cards for games
        (128, 101376, "half", 100, 8192, "whole"),
        (304, 65536, "half", 256, 8192, "small"),  # AMD's
    ],
)
def test_tiles_fit_the_device(
    processors: int, shared: int, kind: str, dim: int, rows: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_limits", lambda device: (processors, shared, True))
    for tile in kernels.tiles(kind, dim, rows, 8, 4, torch.device("cpu")):
        size = "whole" if tile.whole else "large" if tile.rows == 128 else "small"
        assert (size, True) == (expected, tile.shared_bytes(2 if kind == "half" else 4) <= shared)
        assert tile.depth <= 2 * dim and tile.width <= 2 * dim
    monkeypatch.setattr(kernels, "_limits", lambda device: (processors, shared, False))
    assert not any(t.whole for t in kernels.tiles(kind, dim, rows, 8, 4, torch.device("cpu")))


@pytest.mark.parametrize(
    ("name", "matmul_dtype", "dim", "shared"),
    [
        unless_interpreted("ixamclr", "float16", 140, 1 << 20, fast=True),
        unless_interpreted("amclr", "float16", 300, 1 << 20, fast=True),
        unless_interpreted("amclr", "float16", 140, 0, fast=False),
        unless_interpreted("ixamclr", "tf32", 140, 0, fast=False),
        unless_interpreted("amclr", "auto", 140, 0, fast=False),
    ],
)
def test_large_tiles(name: str, matmul_dtype: str, dim: int, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of large batches, with positives beside the row itself and without."""
    monkeypatch.setattr(kernels, "_limits", lambda device: (1, max(shared, 100 << 10), shared > 0))
    for ids in (torch.arange(140), torch.arange(140) % 137):
        both = {"image": ids, "text": ids}
        given = run("triton", name, both, 140, dim, matmul_dtype, torch.float32, temperature=0.1)
        exact = run("eager", name, both, 140, dim, "auto", torch.float64, temperature=0.1)
        for view, gradient in given[1].items():
            error = float((gradient.double() - exact[1][view]).norm() / exact[1][view].norm())
            assert error < TOLERANCES[matmul_dtype], (view, error)
        torch.testing.assert_close(
            given[2], exact[2], rtol=10 * TOLERANCES[matmul_dtype], atol=10 * TOLERANCES[matmul_dtype]
        )


def test_asked_for_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    objective = build("sogclr", 4, backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' needs views on a GPU"):
        objective({"image": torch.eye(4), "text": torch.eye(4)}, torch.arange(4))
