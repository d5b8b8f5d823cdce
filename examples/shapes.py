"""What stands for your own data and encoders in the examples: images of a shape, captions in two wordings.

An image shows a shape of a colour at a place on a ground; every combination is one sample, so no two captions are
alike. A quarter of the combinations is held out: a model that finds them has learned what the words mean.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import amclr

SIZE = 32
COLOURS = {
    "red": (0.9, 0.2, 0.2), "green": (0.2, 0.7, 0.3), "blue": (0.2, 0.3, 0.9), "yellow": (0.9, 0.85, 0.2),
    "purple": (0.6, 0.2, 0.7), "orange": (0.95, 0.55, 0.1), "pink": (1.0, 0.6, 0.75), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
GROUNDS = {"black": 0.05, "dark": 0.25, "grey": 0.45, "light": 0.7}
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
SHAPES = ("square", "cross", "ring", "bar")
COMBINATIONS = list(product(COLOURS, SHAPES, PLACES, GROUNDS))
WORDS = sorted({w for c in COMBINATIONS for part in c for w in part.split()} | {"a", "at", "the", "on", "ground"})


def image(colour: str, shape: str, place: str, ground: str) -> Tensor:
    """(3, SIZE, SIZE) in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    row, column = divmod(PLACES.index(place), 3)
    dy, dx = (y - 6 - 10 * row).abs(), (x - 6 - 10 * column).abs()
    far = torch.maximum(dy, dx)
    inside = {
        "square": far <= 4, "cross": (far <= 4) & ((dy <= 1) | (dx <= 1)), "ring": (far <= 4) & (far >= 3),
        "bar": (dy <= 1) & (dx <= 4),
    }[shape]  # fmt: skip
    return torch.where(inside, torch.tensor(COLOURS[colour])[:, None, None], torch.tensor(GROUNDS[ground]))


def captions(colour: str, shape: str, place: str, ground: str) -> tuple[str, str]:
    """The caption, and the same in other words."""
    return f"a {colour} {shape} at the {place} on {ground} ground", f"on {ground} at {place} a {shape} the {colour}"


class Shapes(Dataset[dict[str, Tensor]]):
    """Samples with two views of image and caption each, and an id: the row of its estimates."""

    def __init__(self, split: str) -> None:
        order = torch.randperm(len(COMBINATIONS), generator=torch.Generator().manual_seed(0)).tolist()
        held = len(order) // 4
        self.rows = [COMBINATIONS[i] for i in (order[held:] if split == "train" else order[:held])]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        caption, other = captions(*self.rows[index])
        clean = image(*self.rows[index])
        return {
            "id": torch.tensor(index), "image": varied(clean), "image_aug": varied(clean),
            "text": tokens(caption), "text_aug": tokens(other),
        }  # fmt: skip


def varied(image: Tensor) -> Tensor:
    """A view of an image: another brightness, and noise."""
    return image * (0.8 + 0.4 * torch.rand(())) + 0.05 * torch.randn_like(image)


def tokens(text: str) -> Tensor:
    """A caption as numbers (10,), padded with the first number that is no word."""
    found = [WORDS.index(w) for w in text.split()]
    return torch.tensor(found + [len(WORDS)] * (10 - len(found)))


class Encoders(nn.Module):
    """A small convolutional net for images, the mean of word vectors for captions: unit rows (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64))
        self.words = nn.EmbeddingBag(len(WORDS) + 1, 128, mode="sum", padding_idx=len(WORDS))
        self.text = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the objective takes: view name -> unit rows."""
        rows = {v: self.image(batch[v]) for v in batch if v.startswith("image")}
        rows |= {v: self.text(self.words(batch[v])) for v in batch if v.startswith("text")}
        return {view: nn.functional.normalize(x, dim=-1) for view, x in rows.items()}


@torch.no_grad()
def recall(encoders: Encoders) -> dict[str, float]:
    """Retrieval among the held-out images and their captions, in percent."""
    encoders.eval()
    rows = Shapes("val").rows
    images = torch.stack([image(*row) for row in rows])
    texts = torch.stack([tokens(captions(*row)[0]) for row in rows])
    found = encoders({"image": images, "text": texts})
    encoders.train()
    return amclr.evaluate.retrieval(found["image"], found["text"], torch.arange(len(rows)))
