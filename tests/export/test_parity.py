"""Parity: what differs is measured, and ties are left aside."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from amclr.export.parity import parity


def rows(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_parity_tells_what_differs() -> None:
    image, text = rows(40, 0), rows(40, 1)
    alike = parity((image, text), (image + 1e-8, text))
    assert alike.difference < 1e-7 and alike.same == alike.queries == 80 and alike.overlap == 1
    assert alike.cosine == pytest.approx(1, abs=1e-9)
    turned = text.clone()
    turned[3] = -text[3]
    result = parity((image, text), (image, turned))
    assert result.difference == pytest.approx(float(2 * text[3].abs().max())) and result.cosine == pytest.approx(-1)
    top = (image.double() @ text.double().T).topk(10).indices
    assert result.same < 80 - int((top == 3).any(dim=1).sum()) and result.overlap < 1
    wrong = text.clone()
    wrong[0, 0] = math.nan
    assert math.isnan(parity((image, text), (image, wrong)).difference)


def test_parity_leaves_ties_aside_and_nothing_else() -> None:
    image = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.2, 1.0]]), dim=-1)
    moved = text.clone()
    moved[0] = F.normalize(text[0] + torch.tensor([1e-8, -1e-8]), dim=-1)
    assert parity((image, text[:2]), (image, moved[:2])).same == 4, "two captions that are one: any order"
    swapped = text[[2, 1, 0]]
    assert parity((image, text), (image, swapped)).same < 5
