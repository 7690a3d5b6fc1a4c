"""Completion in shells: `example:` names beside files, and words with a colon in bash."""

from __future__ import annotations

import glob
import os
import re

from click.shell_completion import BashComplete, CompletionItem, split_arg_string

from attndsl.shipped import PREFIX, names


def files(incomplete: str) -> list[CompletionItem[str]]:
    """Files; the examples where `example:` is begun and no file is."""
    begun = incomplete.startswith(PREFIX)
    if begun or (PREFIX.startswith(incomplete) and not glob.glob(f"{glob.escape(incomplete)}*")):
        examples = (PREFIX + name for name in names())
        return [CompletionItem(example) for example in examples if example.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file")]


class Bash(BashComplete):
    """Bash ends words at `:` and `=`: `example`, `:` and `lo` are one here, and it gets back what follows."""

    kept = 0
    """Characters of the word that bash keeps before those that it replaces."""

    def get_completion_args(self) -> tuple[list[str], str]:
        words = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
        line = re.sub(r"\n([:=])\n?", r"\1", "\n".join(words))
        whole, replaced = line.rpartition("\n")[2], words[-1] if words[-1] not in (":", "=") else ""
        self.kept = len(whole) - len(replaced)
        _, *args = split_arg_string(line)
        return args, args.pop() if whole else ""

    def format_completion(self, item: CompletionItem[str]) -> str:
        return f"{item.type},{item.value[self.kept :]}"
