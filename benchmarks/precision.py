"""What each precision of the embeddings and products costs: relative error of the gradient against float64.

    python -m benchmarks.precision [--batch 1024] [--dim 256] [--seeds 3]

xAmCLR, the second of two steps (so that the estimates have a past), on rows that resemble their
counterparts as in training. "views in float16": the embeddings come in that type, as under autocast.
"products in float16": they come in float32 and are rounded to it for the products; sums stay in float32.
"similarities in bfloat16": what a loss under bfloat16 autocast does; worked out here for comparison.
"""

from __future__ import annotations

import argparse

import torch
from benchmarks.objectives import VIEWS, machine
from torch import Tensor
from torch.nn import functional as F

from amclr.objectives import build


def views_of(batch: int, dim: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, dim, generator=generator)
    return {v: F.normalize(base + torch.randn(batch, dim, generator=generator), dim=-1) for v in VIEWS}


def gradient(views: list[dict[str, Tensor]], tau: float, dtype: torch.dtype, matmul_dtype: str = "auto") -> Tensor:
    batch = len(views[0]["image"])
    objective = build("xamclr", batch, temperature=tau, matmul_dtype=matmul_dtype).to(
        torch.promote_types(dtype, torch.float32)
    )
    for step in views:
        leaves = {v: x.detach().clone().to(dtype).requires_grad_() for v, x in step.items()}
        objective(leaves, torch.arange(batch))[0].backward()
    found = [x.grad for x in leaves.values()]
    return torch.cat([g.double() for g in found if g is not None])


def rounded_similarities(views: list[dict[str, Tensor]], tau: float) -> tuple[Tensor, Tensor]:
    """Gradients of SogCLR's image term alone, from bfloat16 similarities and from float64 ones."""
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        log_u = None
        for step in views:
            image, text = step["image"].double(), step["text"].double()
            s = (image @ text.T).to(dtype).double()
            d = ((s - s.diagonal()[:, None]) / tau).fill_diagonal_(-torch.inf)
            log_g = d.logsumexp(1)
            past = log_g if log_u is None else log_u
            log_u = torch.logaddexp(past + torch.tensor(0.2).log(), log_g + torch.tensor(0.8).log())
            w = (d - log_u[:, None]).exp()
        found.append((w @ text - w.sum(1, keepdim=True) * text) / len(image))
    return found[0], found[1]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(
        f"{machine('cpu', torch.get_num_threads())}; B {options.batch}, D {options.dim}; worst of {options.seeds} seeds"
    )
    taus = (0.005, 0.01, 0.03, 0.1, 1.0)
    print(f"| | {' | '.join(f'tau {t:g}' for t in taus)} |\n{'|---' * (len(taus) + 1)}|")
    kinds = {
        "views in float32": (torch.float32, "auto"), "views in float16": (torch.float16, "auto"),
        "views in bfloat16": (torch.bfloat16, "auto"), "products in float16": (torch.float32, "float16"),
        "products in bfloat16": (torch.float32, "bfloat16"),
    }  # fmt: skip
    worst: dict[tuple[str, float], float] = {}
    for seed in range(options.seeds):
        views = [views_of(options.batch, options.dim, 2 * seed + step) for step in range(2)]
        for tau in taus:
            exact = gradient(views, tau, torch.float64)
            found = {name: error(gradient(views, tau, *kind), exact) for name, kind in kinds.items()}
            found["similarities in bfloat16"] = error(*rounded_similarities(views, tau))
            for name, value in found.items():
                worst[name, tau] = max(worst.get((name, tau), 0.0), value)
    for name in [*kinds, "similarities in bfloat16"]:
        print(f"| {name} | {' | '.join(f'{worst[name, t]:.0e}' for t in taus)} |")


if __name__ == "__main__":
    main()
