"""Version folders as TF Serving polls them: a number appears whole or not at all."""

import contextlib
import pathlib
import shutil
import tempfile


def check_version(path, version, overwrite):
    """The folder of a version; ValueError if the number does not fit or is taken."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"`version` is a whole number of at least 1, the newest is served; received {version!r}.")
    folder = pathlib.Path(path) / str(version)
    if folder.exists() and not overwrite:
        raise ValueError(
            f"Version {version} exists already in '{path}'. Export the next number, or pass `overwrite=True` to "
            "replace it (a running server keeps what it has loaded)."
        )
    return folder


@contextlib.contextmanager
def written_whole(folder: pathlib.Path):
    """A temporary folder beside `folder`, which takes its place if the block ends well and vanishes if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A server takes folders with numbers for names alone, so it does not see this one.
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
