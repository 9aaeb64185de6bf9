"""Version folders as TF Serving polls them: a version appears complete or not at all."""

import pathlib


def check_version(path, version, overwrite):
    """The folder of a version; ValueError if the number is invalid or already exists."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"`version` must be a positive integer (the largest is served); received {version!r}.")
    folder = pathlib.Path(path) / str(version)
    if folder.exists() and not overwrite:
        raise ValueError(
            f"Version {version} exists already in '{path}'. Export the next number, or pass `overwrite=True` to "
            "replace it (a running server keeps what it has loaded)."
        )
    return folder
