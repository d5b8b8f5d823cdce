"""What the Triton kernels come to on a GPU, by tile: what the compiler reports, and, where there is a GPU, the time.

    python -m benchmarks.kernels [--capability 90] [--kinds half,tf32,ieee] [--dims 256,512] [--matches 1]  without one
    python -m benchmarks.kernels --time 1024,4096,32768 [--kinds half]                          on a GPU

The first compiles both passes of the closed form, with every tile that `amclr.objectives.backends.triton_kernels` may choose,
to machine code, and counts in it: registers of a thread and bytes of its stack (what did not fit in them), memory
that a program's warps share, instructions of the matrix units (HGMMA since sm_90, HMMA before), multiply-adds without
them (FFMA), and exponentials. The second runs each tile in turn (AmCLR, temperature 0.05) and says what it takes,
and which one `tiles` chooses.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from benchmarks.objectives import Step, machine, median_times, print_header, print_row, views_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from amclr.objectives import build
from amclr.objectives.backends import BlockInputs
from amclr.objectives.backends import triton_kernels as kernels
from amclr.objectives.backends.triton_kernels import TileShape
from amclr.objectives.layout import layouts
from amclr.objectives.positives import Positives

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KINDS = {"half": ("*bf16", torch.bfloat16, "bfloat16"), "tf32": ("*fp32", torch.float32, "tf32"),
         "ieee": ("*fp32", torch.float32, "auto")}  # fmt: skip
"""By how products are formed: the features' type for the compiler and in torch, and the objective's `matmul_dtype`."""
SPECIAL = {
    **dict.fromkeys(("terms", "columns", "partners"), "*i32"),
    **dict.fromkeys(("ids", "ones", "others"), "*i64"),
    **dict.fromkeys(("first", "last", "n", "d", "rate_stride"), "i32"),
    **dict.fromkeys(("lift", "rho", "unscale"), "fp32"),
}  # fmt: skip
"""Types of the kernels' arguments that are no pointers to float32."""
COUNTED = ("HGMMA", "HMMA", "FFMA", "MUFU.EX2")


def compiled(kernel: Any, constants: dict[str, Any], capability: int, features: str = "*bf16", **launch: int) -> Any:
    """A kernel as machine code for a GPU, which need not be there.

    Pointers and sizes are taken for multiples of 16, as they are in practice, so that loads are as wide. The gradient is
    in float32, but for bfloat16 features.
    """
    names = kernel.arg_names
    given = SPECIAL | {"z": features, "gradient": "*bf16" if features == "*bf16" else "*fp32"}
    types = {n: "constexpr" if n in constants else given.get(n, "*fp32") for n in names}
    even = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(names) if types[n].startswith("*") or n in ("n", "d")}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=even)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


def report(made: Any) -> dict[str, int]:
    """Registers, stack and shared memory of a compiled kernel, and how many of some instructions stand in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = {name.lower(): int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK")}
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", code)) for name in COUNTED}
    return {**found, "shared": made.metadata.shared, **counts}


def every_tile(kind: str, dim: int, whole: bool) -> Iterator[tuple[int, TileShape]]:
    """The tiles that may be chosen for a kind of product and rows of so many dimensions: (pass, tile)."""
    for position, tiles in enumerate(zip(*kernels.tile_pairs(kind, dim, whole), strict=True)):
        yield from ((position, tile) for tile in dict.fromkeys(tiles))


def described(tile: TileShape) -> str:
    """A tile in a few characters."""
    width = f" x {tile.width}" if tile.width else ""
    return f"{tile.rows} x {tile.candidates} x {tile.depth}{width}{', whole' * tile.whole}"


def products(position: int, tile: TileShape, dim: int) -> float:
    """Matrix products (B x D by D x B, or alike) of a pass of AmCLR, whose least are 4 and 12 by tiles formed twice."""
    return 8.0 if position == 0 else 8.0 * math.ceil(dim / tile.width) + 8.0


def compile_all(capability: int, kinds: list[str], dims: list[int], matches: int) -> None:
    """Print what the compiler reports on each tile."""
    print(f"Triton {triton.__version__}, sm_{capability}; AmCLR's two passes: similarities, then the gradient; "
          f"labels compared: {matches}")  # fmt: skip
    print_header(["products of", "D", "pass", "tile", "warps", "stages", "B x B x D products", "registers", "stack bytes",
                  "shared KiB", *COUNTED])  # fmt: skip
    whole = capability // 10 in kernels.WHOLE_CAPABILITIES
    for kind, dim in itertools.product(kinds, dims):
        for position, tile in every_tile(kind, dim, whole):
            precision = "tf32" if kind == "tf32" else "ieee"
            constants = {"MATCHES": matches, "PRECISION": precision, **tile.sizes}
            if position:
                constants |= {"PARTNERS": 2, "SLOPES": False}
            kernel = kernels._gradients if position else kernels._log_sums
            found = report(compiled(kernel, constants, capability, KINDS[kind][0], **tile.launch))
            print_row([kind, dim, position + 1, described(tile), tile.warps, tile.stages,
                       f"{products(position, tile, dim):g}", found["reg"], found["stack"],
                       f"{found['shared'] / 1024:.0f}", *(found[n] for n in COUNTED)])  # fmt: skip


class Passes:
    """The two passes of AmCLR's blocks over some views, with whatever tile."""

    def __init__(self, kind: str, size: int, dim: int, device: str) -> None:
        _, dtype, as_products = KINDS[kind]
        objective = build("amclr", size)
        views = views_of(size, dim, device, dtype)
        names = objective.parts.views
        positives = Positives.of([torch.arange(size, device=device)], torch.device(device))
        self.blocks = kernels.TritonBlocks(BlockInputs(
            [views[v].detach() for v in names], slice(0, size), layouts(objective.terms, names, True), 0.05, positives,
            as_products, 2 / objective.gamma,
        ))  # fmt: skip
        self.chosen = self.blocks.tiles
        self.offsets, self.own = torch.full((2, 8, size), 40.0, device=device)
        self.gradient = torch.empty(4, size, dim, device=device, dtype=self.blocks.z.dtype)

    def run(self, position: int, tile: TileShape) -> None:
        """A pass, once."""
        self.blocks.tiles = (tile, tile)
        if position:
            self.blocks.gradients_from(self.offsets, self.own, self.gradient, set(), False)
        else:
            self.blocks.anchors()


def time_all(sizes: list[int], kinds: list[str], dims: list[int], seconds: float, device: str) -> None:
    """Print what each tile takes, and whether it is the one chosen."""
    print(f"{machine(device, torch.get_num_threads())}; AmCLR's two passes: similarities, then the gradient.")
    print_header(["products of", "D", "B", "pass", "tile", "ms", "TFLOP/s", "chosen"])
    for kind, dim, size in itertools.product(kinds, dims, sizes):
        passes = Passes(kind, size, dim, device)
        whole = device == "cpu" or kernels._limits(passes.blocks.z.device)[2]
        steps: tuple[dict[TileShape, Step], dict[TileShape, Step]] = {}, {}
        for position, tile in every_tile(kind, dim, whole):
            try:
                passes.run(position, tile)
            except triton.runtime.errors.OutOfResources as error:
                print_row([kind, dim, size, position + 1, described(tile), error, "", ""])
            else:
                steps[position][tile] = partial(passes.run, position, tile)
        for position, tiles in enumerate(steps):
            times = median_times({described(tile): step for tile, step in tiles.items()}, seconds, device)
            for tile in tiles:
                taken = times[described(tile)]
                rate = products(position, tile, dim) * 2 * size**2 * dim / taken / 1e12
                print_row([kind, dim, size, position + 1, described(tile), f"{1e3 * taken:.3f}", f"{rate:.1f}",
                           "yes" if tile == passes.chosen[position] else ""])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU that is compiled for: 80, 90, ...")
    parser.add_argument("--kinds", default="half,tf32,ieee")
    parser.add_argument("--dims", default="256,512")
    parser.add_argument("--matches", type=int, default=1, help="labels that a pair is compared by: 1 for ids on the device, "
                        "which may stand twice")  # fmt: skip
    parser.add_argument("--time", default="", help="batch sizes at which to run the tiles, instead of compiling them")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the tiles of a pass at a size")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    kinds, dims = options.kinds.split(","), [int(d) for d in options.dims.split(",")]
    if not options.time:
        compile_all(options.capability, kinds, dims, options.matches)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--time needs a GPU")
    time_all([int(b) for b in options.time.split(",")], kinds, dims, options.seconds, options.device)


if __name__ == "__main__":
    main()
