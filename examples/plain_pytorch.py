"""AmCLR in a plain PyTorch loop, with data and encoders of your own; stopped and gone on with, as if never stopped.

    python examples/plain_pytorch.py                 # half a minute on one core
    python examples/plain_pytorch.py --epochs 20     # goes on from where that ended

Of amclr it takes the objective and the measure, which need torch and NumPy alone. What to look at: the objective
gets every sample's id, the row of its running estimates; and the estimates are in the checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from shapes import Encoders, Shapes, recall
from torch.utils.data import DataLoader

import amclr


def main() -> None:
    """Train, a checkpoint after each epoch."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--checkpoint", type=Path, default=Path("runs/plain-pytorch.pt"))
    given = options.parse_args()

    torch.manual_seed(0)
    data = Shapes("train")
    encoders = Encoders()
    objective = amclr.objectives.build("amclr", num_samples=len(data), temperature=0.05, gamma=0.8)
    # The objective has parameters of its own where its temperature is learned.
    optimizer = torch.optim.AdamW([*encoders.parameters(), *objective.parameters()], lr=2e-3)
    print(f"before: mean recall {recall(encoders)['r_mean']:.1f} %")

    done = 0
    if given.checkpoint.is_file():
        state = torch.load(given.checkpoint, weights_only=True)
        encoders.load_state_dict(state["encoders"])
        optimizer.load_state_dict(state["optimizer"])
        objective.load_state_dict(state["objective"])  # without it, every estimate would begin anew
        done = state["epochs"]
        print(f"going on after epoch {done}")

    for epoch in range(done, given.epochs):
        torch.manual_seed(epoch)  # order and views follow from the epoch, so that going on repeats nothing
        objective.start_epoch(epoch, given.epochs)  # for schedules; a constant gamma does without
        total = 0.0
        batches = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
        for batch in batches:
            loss, _ = objective(encoders(batch), batch["id"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(batches):.4f}")
        given.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {"encoders": encoders.state_dict(), "optimizer": optimizer.state_dict(),
                 "objective": objective.state_dict(), "epochs": epoch + 1}  # fmt: skip
        torch.save(state, given.checkpoint)

    print(f"after: mean recall {recall(encoders)['r_mean']:.1f} %")


if __name__ == "__main__":
    main()
