"""Austen's novels as token ids: four for training, two held out."""

import pathlib

import numpy as np

from examples.datasets.austen import austen, chapters

TRAINING = ("sense and sensibility", "pride and prejudice", "mansfield park", "emma")
HELD_OUT = ("northanger abbey", "persuasion")


def plain(text):
    """One line per paragraph: the line breaks of the edition are not part of the text."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n") if part.strip())


def book_ids(tokenizer, folder):
    """Title to int32 token ids, cached in `folder/austen_ids.npz`."""
    cache = pathlib.Path(folder) / "austen_ids.npz"
    if not cache.exists():
        found = {}
        for title, lines in austen(pathlib.Path(folder).parent / "austen").items():
            parts = [np.asarray(tokenizer(plain(chapter) + "\n\n")) for chapter in chapters(lines)]
            found[title] = np.concatenate(parts).astype("int32")
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **found)
    with np.load(cache) as held:
        return {title: held[title] for title in held.files}
