"""Files and folders that appear whole or not at all: they are written under another name first."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import threading


@contextlib.contextmanager
def replace_file(path):
    """A binary file to write to, which takes the place of `path` if the block ends well; else `path` is unchanged.

    ```python
    with replace_file("report.json") as file:
        file.write(b"{}")
    ```

    The bytes go to `.NAME.partial` in the same folder, and reach the disk before the name changes. Writers of one file
    take turns there, so killed processes leave one such file at most, and the next writer takes it over.

    Args:
        path: str or path; its folder exists. A link is followed.

    Raises:
        OSError: if it cannot be written; an existing file is left unchanged.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    partial, handle, alone = _open_partial(folder, name)
    try:
        os.ftruncate(handle, 0)
        file = _Writer(handle)
        yield file
        os.fsync(handle)
        if alone:  # Windows renames closed files only
            handle = os.close(handle)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            if alone or _is_at(handle, partial):
                os.unlink(partial)
        raise
    finally:
        if handle is not None:
            os.close(handle)
    sync_folder(folder)


def sync_folder(folder):
    """Waits until the names in `folder` have reached the disk, where the system can say so."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replace_folder(path):
    """A new folder, which takes the place of `path` if the block ends well, and vanishes if not.

    It is made beside `path`, under a name that begins with a dot, as a `pathlib.Path`. Missing parents are made.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def add_files(folder, last):
    """A new folder whose files move into `folder` if the block ends well; the file named `last` comes last.

    For files that belong together, where the last one says that all of them are there.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{pathlib.Path(last).stem}-", dir=folder) as temporary:
        temporary = pathlib.Path(temporary)
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
            os.replace(file, folder / file.name)


class _Writer:
    """The file of `replace_file`: writes all of what it is given."""

    def __init__(self, handle):
        self._handle = handle

    def write(self, data):
        data = memoryview(data).cast("B")
        size = len(data)
        while len(data):
            data = data[os.write(self._handle, data) :]
        return size


def _open_partial(folder, name):
    """`(path, handle, alone)`: a file held under a lock or, where there are no locks, one of this thread alone."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        import fcntl
    except ImportError:
        partial = os.path.join(folder, f".{name}.{os.getpid()}-{threading.get_ident()}.partial")
        return partial, os.open(partial, flags, 0o666), True
    partial = os.path.join(folder, f".{name}.partial")
    while True:
        handle = os.open(partial, flags, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, partial):  # else the writer before us has put it in place
                return partial, handle, False
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(handle, path):
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
