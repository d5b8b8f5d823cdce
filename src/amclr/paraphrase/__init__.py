"""Paraphrases of captions by a language model or by rules, over several processes."""

from typing import TYPE_CHECKING

from amclr.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from amclr.paraphrase.generate import paraphrase

__all__ = ["paraphrase"]

__getattr__, __dir__ = lazy_exports(__name__, {"paraphrase": "generate"})
