"""One paraphrase per caption, for queries in other words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from amclr.data.text.filters import Filters, choose
from amclr.data.text.rules import RULES, reword
from amclr.data.text.store import dump_json, read_store
from amclr.data.text.wording import words
from amclr.utils.errors import UserError


@dataclass(frozen=True)
class Rewording:
    """One paraphrase per caption, always the same one, for queries in other words."""

    by: str
    """`rules`, or the file or folder of a store."""
    digest: str
    """Identifies the paraphrases: equal if every caption has the same paraphrase."""
    of: Callable[[str], str | None]
    """The paraphrase of a caption, or None if there is none."""

    @classmethod
    def find(cls, setting: str) -> Rewording:
        """The first paraphrase that `amclr paraphrase --model rules` would keep, or the first in a store.

        setting: `rules`, a file, or a folder that `amclr paraphrase` wrote. Raises UserError, saying what to type,
        for a store that cannot be read.
        """
        if setting == "rules":
            filters = Filters()
            return cls(
                setting, f"rules {RULES}",
                lambda caption: next(iter(choose(caption, reword(caption, 1, 0), 1, filters)[0]), None),
            )  # fmt: skip
        path = Path(setting).expanduser()
        if not path.exists():
            raise UserError(
                f"no paraphrases at '{setting}': give rules, a file with the columns caption,paraphrase, or a folder "
                "that `amclr paraphrase` wrote"
            )
        try:
            store = read_store(path)
        except UserError as error:  # which names options of training
            message = str(error).replace("--source.paraphrases none", "give rules")
            raise UserError(message.replace("with --source.paraphrases", "by its folder")) from None
        digest = hashlib.sha256(dump_json(sorted(store.texts.items())).encode("utf-8", "backslashreplace"))
        return cls(
            setting, digest.hexdigest(),
            lambda caption: next((p for p in store.of(caption) if words(p) != words(caption)), None),
        )  # fmt: skip
