"""Contrastive objectives for image-text dual encoders: needs torch and NumPy alone.

objective = amclr.objectives.build("amclr", num_samples=len(dataset))
loss, metrics = objective({"image": i, "image_aug": i2, "text": t, "text_aug": t2}, ids)
"""

from amclr.config.schema import LossConfig
from amclr.objectives.factory import build
from amclr.objectives.methods import METHODS, PAIRS, VIEWS, Method, Term, modality
from amclr.objectives.microbatch import backward_in_chunks
from amclr.objectives.objective import Objective

__all__ = [
    "METHODS", "PAIRS", "VIEWS", "LossConfig", "Method", "Objective", "Term", "backward_in_chunks", "build", "modality",
]  # fmt: skip
