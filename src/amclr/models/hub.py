"""A model as a self-contained folder, or under a name on the Hugging Face Hub, with a model card.

config.json            settings of the model, and facts about its training
model.safetensors      all weights, including those of frozen pretrained towers
tokenizer/             of the text tower
image_tower/           timm's configuration of the image tower, except for `small` and the packaged one
text_tower/            the text tower's configuration, except for `small`
README.md              the model card
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from amclr.config.checks import from_dict
from amclr.config.schema import ModelConfig
from amclr.models import packaged
from amclr.models.pretrained import import_transformers
from amclr.utils.errors import UserError, first_line

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class OnHub(ModelHubMixin):
    """Gives `DualEncoder` its `save_pretrained`, `from_pretrained` and `push_to_hub`."""

    config: ModelConfig
    about: dict[str, Any]

    def _save_pretrained(self, save_directory: Path) -> None:
        model: Any = self
        if model.has_adapters:
            raise ValueError("the model has adapters: call merge_adapters() first")
        if model.config.image_tower not in ("small", packaged.IMAGE_TOWER):
            from timm.models._hub import save_config_for_hf  # what its save_for_hf uses, without the weights

            (save_directory / "image_tower").mkdir(exist_ok=True)
            save_config_for_hf(model.image_tower.trunk, str(save_directory / "image_tower" / CONFIG))
        if model.config.text_tower != "small":
            model.text_tower.trunk.config.save_pretrained(save_directory / "text_tower")
        model.tokenizer.save_pretrained(save_directory / "tokenizer")
        # Contiguous, since convolution kernels may be in channels-last order.
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, save_directory / WEIGHTS, {"format": "pt"})
        content = {"amclr": FORMAT, "model": asdict(model.config), "training": model.about}
        (save_directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None = None, cache_dir: str | Path | None = None,
        force_download: bool = False, local_files_only: bool = False, token: str | bool | None = None, **_: Any,
    ) -> Self:  # fmt: skip
        folder = Path(model_id)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(
                    model_id, revision=revision, cache_dir=cache_dir, force_download=force_download,
                    local_files_only=local_files_only, token=token,
                ))  # fmt: skip
            except Exception as error:  # the Hub's client raises many kinds
                raise UserError(f"cannot download '{model_id}' from the Hub: {first_line(error)}") from None
        return cls.from_folder(folder)

    @classmethod
    def from_folder(cls, folder: Path, text_only: bool = False) -> Self:
        """The model in a folder that `save_pretrained` wrote, or what embeds texts with it.

        Raises UserError, with the reason, if it is unreadable.
        """
        try:
            content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or "amclr" not in content:
                raise UserError(f"'{folder}' holds another library's model: give a run folder, or what "
                                "`amclr export RUN --to hf` wrote")  # fmt: skip
            if content["amclr"] != FORMAT:
                raise UserError(f"'{folder}' has format {content['amclr']}, and this version of amclr reads {FORMAT}: "
                                "pip install --upgrade amclr")  # fmt: skip
            config = from_dict(content["model"], ModelConfig)
            # Built from the configurations in the folder, so that nothing needs to be installed or downloaded.
            local = config
            if config.image_tower not in ("small", packaged.IMAGE_TOWER):
                local = replace(local, image_tower=f"local-dir:{folder / 'image_tower'}")
            if config.text_tower != "small":
                local = replace(local, text_tower=str(folder / "text_tower"))
            tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder / "tokenizer")
            build: Any = cls
            model = build(local, tokenizer, from_checkpoint=True, complete=True, text_only=text_only)
            model.config, model.about = config, dict(content.get("training") or {})
            state = load_file(folder / WEIGHTS)
            model.load_saved({k: v for k, v in state.items() if k.startswith("text_") or not text_only})
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"cannot read the model in '{folder}': {first_line(error)}; export it again") from None
        return model.eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card: what the model is, how it was trained, and its results.

        kwargs: `license`, as the Hub names it; without one, the card says that none is stated.
        """
        return ModelCard(_card(self.config, self.about, kwargs.get("license")))


def is_export(folder: Path) -> bool:
    """Whether a folder looks like one that `save_pretrained` wrote."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _card(config: ModelConfig, about: dict[str, Any], licence: str | None) -> str:
    header = ["---", "library_name: amclr", "pipeline_tag: zero-shot-image-classification"]
    header += [f"license: {licence}"] if licence else []
    header += ["tags:", "- image-text-retrieval", "- contrastive-learning", "- dual-encoder", "---"]
    sides = (("Image tower", config.image_tower, config.image_pretrained, config.image_lr),
             ("Text tower", config.text_tower, config.text_pretrained, config.text_lr))  # fmt: skip
    rows = []
    for what, tower, loaded, rate in sides:
        start = "from scratch" if tower == "small" or not loaded else "frozen" if rate == 0 else "pretrained"
        rows.append((what, f"{tower} ({start})"))
    rows += [("Images", f"{config.image_size} x {config.image_size} pixels"),
             ("Captions", f"at most {config.max_tokens} tokens"),
             ("Embedding", f"{config.dim} dimensions")]  # fmt: skip
    rows += [(name[0].upper() + name[1:], str(value)) for name, value in about.items()
             if not isinstance(value, dict) and name not in ("name", "command")]  # fmt: skip
    lines = [
        *header, "", f"# {about.get('name') or 'An image-text dual encoder'}", "",
        "Embeds images and captions into one space of unit vectors, for search and zero-shot classification. "
        "Trained with [amclr](https://arxiv.org/abs/2412.07979), whose objectives work with small batches.", "",
        "| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows), "",
    ]  # fmt: skip
    if measured := about.get("measured"):
        lines += ["## Measured", "", "On held-out images of the same data, in percent:", "",
                  "| | |", "|---|---|", *(f"| {k} | {v:.1f} |" for k, v in measured.items()), ""]  # fmt: skip
    if command := about.get("command"):
        lines += ["## Trained by", "", "```sh", str(command).replace("```", ""), "```", ""]
    lines += [
        "## Use", "", "```python", "import amclr", "", 'model = amclr.load("FOLDER_OR_NAME")',
        'texts = model.encode_text(["a dog on the beach"])      # (1, D), unit rows',
        'images = model.encode_image(["beach.jpg"])             # paths, bytes or PIL images',
        "print(texts @ images.T)", "```", "",
        "## Licence", "",
        f"{licence}." if licence else "None is stated by who trained it.",
        "The encoders that it starts from have licences of their own: EfficientNet-Lite0, all-MiniLM-L6-v2, timm's "
        "ResNet-50 and DistilBERT Apache-2.0. So have the images that it was trained on.", "",
        "## Limits", "",
        "It knows what its training images and captions show, with their gaps and biases, and nothing else. "
        "A score orders results; it is no probability.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
