"""What the objective adds to a training step with real towers: EfficientNet-Lite0 and MiniLM, end to end.

    python -m benchmarks.step [--batch 128] [--rounds 3]

The encoders' forward and backward pass on B images of 128 x 128 and captions of 32 tokens, two views
of each where the objective wants them, with a random gradient in the place of a loss; and the objective
on embeddings of the same shape. Times are medians of rounds in which both take turns. Needs amclr[pretrained].
"""

from __future__ import annotations

import argparse
import time

import torch
from benchmarks.objectives import machine, median_times, ours, views_of

from amclr.config.recipes import finetune
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer
from amclr.objectives import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = finetune().model
    model = DualEncoder(config, build_tokenizer(config, []))
    caption = (
        "a brown dog runs along the beach with a stick in its mouth while two children in red coats watch it from afar"
    )
    print(f"{machine('cpu', options.threads)}; B {options.batch}")
    print("| method | encoders ms | objective ms | objective / encoders |\n|---|---|---|---|")
    for name in ("sogclr", "amclr", "xamclr"):
        count = options.batch * (1 if len(build(name, 1).required_views) == 2 else 2)
        images = torch.randint(0, 256, (count, 3, config.image_size, config.image_size), dtype=torch.uint8)
        tokens = model.tokenize([f"{caption} {k}" for k in range(count)])

        def encoders(images: torch.Tensor = images, tokens: dict[str, torch.Tensor] = tokens) -> None:
            image, text = model(images, tokens)
            torch.autograd.backward([image, text], [torch.randn_like(image), torch.randn_like(text)])
            model.zero_grad()

        begin = time.perf_counter()
        encoders()
        seconds = (options.rounds - 1) * (time.perf_counter() - begin)
        objective = ours(name, views_of(options.batch, config.dim, "cpu"), 0.05)
        t = median_times({"encoders": encoders, "objective": objective}, seconds, "cpu")
        print(f"| {name} | {1e3 * t['encoders']:.0f} | {1e3 * t['objective']:.2f} | {t['objective'] / t['encoders']:.2%} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
