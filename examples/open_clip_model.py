"""An open_clip model trained by AmCLR in place of its ClipLoss, with a second view of image and caption.

    python examples/open_clip_model.py               # half a minute on one core; needs pip install open_clip_torch

The model is a small one with random weights, so that nothing is downloaded; `create_model_and_transforms("RN50",
pretrained="openai")` is used alike. What changes against open_clip's own training: the data give ids and
second views, the features go to the objective as a dict, and the model's logit_scale is not used.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from shapes import Shapes, captions, image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

import amclr

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 2, "width": 64, "heads": 2},
}
"""Instead of RN50's 102 million weights, 4.6."""


class Views(Dataset):
    """Two views of image and caption, made by open_clip's transforms and tokenizer, and the sample's id."""

    def __init__(self, transforms: dict[str, object], tokenizer: object) -> None:
        self.rows = Shapes("train").rows
        self.images = [to_pil_image(image(*row)) for row in self.rows]
        self.texts = [tokenizer(list(captions(*row))) for row in self.rows]
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        views = {view: transform(self.images[index]) for view, transform in self.transforms.items()}
        text, other = self.texts[index]
        return {"id": torch.tensor(index), **views, "text": text, "text_aug": other}


def recall(model: open_clip.CLIP, transform: object, tokenizer: object) -> dict[str, float]:
    """Retrieval among the held-out images and their captions, in percent."""
    rows = Shapes("val").rows
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(to_pil_image(image(*r))) for r in rows]), normalize=True)
        texts = model.encode_text(tokenizer([captions(*r)[0] for r in rows]), normalize=True)
    model.train()
    return amclr.evaluate.retrieval(images, texts, torch.arange(len(rows)))


def main() -> None:
    """Train, and measure before and after."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=int, default=15)
    given = options.parse_args()

    torch.manual_seed(0)
    model, as_trained, as_measured = open_clip.create_model_and_transforms("RN50", **SMALL)
    tokenizer = open_clip.get_tokenizer("RN50", context_length=SMALL["text_cfg"]["context_length"])
    # Captions name colours and places, so the second view changes brightness and contrast, and hardly crops.
    # (open_clip warns that these settings are not used, and uses them.)
    changed = open_clip.AugmentationCfg(scale=(0.9, 1.0), color_jitter=(0.3, 0.3, 0.0, 0.0), color_jitter_prob=0.8)
    second = open_clip.image_transform(32, is_train=True, aug_cfg=changed)
    data = Views({"image": as_trained, "image_aug": second}, tokenizer)

    objective = amclr.objectives.build("amclr", num_samples=len(data), temperature=0.05, gamma=0.8)
    model.logit_scale.requires_grad_(False)  # the temperature is the objective's
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*weights, *objective.parameters()], lr=1e-3, weight_decay=0.02)
    print(f"before: mean recall {recall(model, as_measured, tokenizer)['r_mean']:.1f} %")
    for epoch in range(given.epochs):
        for batch in DataLoader(data, batch_size=64, shuffle=True, drop_last=True):
            views = {
                **{v: model.encode_image(batch[v], normalize=True) for v in ("image", "image_aug")},
                **{v: model.encode_text(batch[v], normalize=True) for v in ("text", "text_aug")},
            }
            loss, metrics = objective(views, batch["id"])  # for ClipLoss()(image_features, text_features, logit_scale)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, positives at {metrics['positive'].item():.2f}", flush=True)
    print(f"after: mean recall {recall(model, as_measured, tokenizer)['r_mean']:.1f} %")


if __name__ == "__main__":
    main()
