"""Versions of a session as objects in a folder or bucket, with one writer at a time by the object names alone.

`ROOT/NAME/0000000007` is version 7 of session NAME. A writer that knows version 6 as the newest creates 7, and creating
fails if 7 exists. So the number of the newest version is the fencing token: of two owners that hold the same version
one writes, and the other is refused, now and later. Nothing here relies on clocks, locks or leases.

The store has to offer two things: creating an object fails if its name exists, in one step with its whole content; and
a listing shows all that was created before it began. `create` below says how each kind of store does the first.

Old versions are removed, so a writer that slept for a long time could create a name that existed and is gone. It finds
out after creating: a version counts only if the one before it is still there, and, once there is a newer one, if that
one names it among its ancestors. Otherwise it removes what it wrote and is refused.
"""

import collections
import contextlib
import os
import re
import secrets
import threading
import time

from keras_fam.serve.errors import BadRequest, NoSuchSession, StaleOwner
from keras_fam.utils import safetensors_file
from keras_fam.utils.atomic import sync_folder

# Stores whose packages create an object in one step unless it exists.
ATOMIC = {
    "file": "link(2), which fails if the name exists",
    "memory": "a lock of this process",
    "s3": "If-None-Match of S3's PutObject",
    "gs": "if-generation-match of Cloud Storage",
    "abfs": "If-None-Match of Blob Storage",
}
_ALIASES = {"local": "file", "s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs", "adl": "abfs"}
NAME = re.compile(r"[A-Za-z0-9_-]{22,128}")
HEADER = 1 << 16  # bytes that are read for a header at first
KNOWN = 10_000  # sessions whose last version is remembered, so that writing on top of it reads nothing
ANCESTORS = 16  # how many versions back a version names its ancestors
_LOCKS, _LOCKS_GUARD = {}, threading.Lock()


def filesystem(url, storage_options=None):
    """`(fs, root, kind)` of a URL or a path.

    Raises:
        ImportError: without fsspec, or the package that it needs for this kind of URL.
    """
    try:
        import fsspec
    except ImportError as error:
        raise ImportError("A store of sessions needs fsspec: pip install 'keras-fam[store]'.") from error
    fs, root = fsspec.core.url_to_fs(str(url), **(storage_options or {}))
    kinds = [fs.protocol] if isinstance(fs.protocol, str) else list(fs.protocol)
    kinds = [_ALIASES.get(kind, kind) for kind in kinds]
    return fs, root.rstrip("/"), next((kind for kind in kinds if kind in ATOMIC), kinds[0])


class ObjectLog:
    """Versions by name in one folder. All errors of the store itself are OSErrors, after a few attempts.

    Args:
        url: a path or a URL that fsspec knows; the folder is made if it is missing.
        storage_options: None, or a dict for fsspec.
        assume_exclusive_create: take a store that is not in `ATOMIC`, on the caller's word.
        attempts: how often a failing call to the store is made.
    """

    def __init__(self, url, storage_options=None, *, assume_exclusive_create=False, attempts=5):
        self.fs, self.root, self.kind = filesystem(url, storage_options)
        self.attempts = attempts
        self._known = collections.OrderedDict()
        if self.kind not in ATOMIC and not assume_exclusive_create:
            raise BadRequest(
                "Two owners are kept apart by creating an object only if its name is free, in one step; of "
                f"{self.kind!r} that is not known. Use one of {', '.join(sorted(ATOMIC))}, or pass "
                "`assume_exclusive_create=True` if you know that its fsspec package does so for `mode='create'`."
            )
        with _LOCKS_GUARD:  # memory:// is one store for all of a process
            self._lock = _LOCKS.setdefault("memory", threading.RLock()) if self.kind == "memory" else None
        self._call(self.fs.makedirs, self.root, exist_ok=True)
        self._probe()

    # The store ------------------------------------------------------------------------------------------------------

    def _call(self, function, *args, **kwargs):
        """`function(...)`, tried again after failures of the store; a missing or existing file is an answer."""
        for attempt in range(self.attempts):
            try:
                with self._lock or contextlib.nullcontext():
                    return function(*args, **kwargs)
            except (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError):
                raise
            except OSError:
                if attempt == self.attempts - 1:
                    raise
                time.sleep(0.01 * 4**attempt)

    def create(self, path, data):
        """Creates an object whole, or raises FileExistsError.

        On a local disk the bytes go to a hidden file, reach the disk, and get their name by `link(2)`, which fails if
        there is one: a killed writer leaves no version that is half there. Elsewhere the package's `mode="create"` asks
        the store itself (see `ATOMIC`).
        """
        if self.kind != "file":
            self.fs.pipe_file(path, data, mode="create")
            return
        folder, name = os.path.split(path)
        partial = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.partial")
        os.makedirs(folder, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        sync_folder(folder)

    def _probe(self):
        """Refuses a store that lets a name be created twice."""
        path = f"{self.root}/.probe-{secrets.token_hex(8)}"
        try:
            self._call(self.create, path, b"1")
            try:
                self._call(self.create, path, b"2")
            except FileExistsError:
                return
            raise BadRequest(
                f"A store of sessions refuses to create an object whose name exists; {self.root} ({self.kind}) "
                "replaced it. Upgrade its fsspec package, or use another store."
            )
        finally:
            with contextlib.suppress(OSError):
                self._call(self.fs.rm_file, path)

    def _list(self, folder):
        def listed():
            self.fs.invalidate_cache(folder)
            return self.fs.ls(folder, detail=False)

        try:
            return [path.rstrip("/").rsplit("/", 1)[-1] for path in self._call(listed)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _remove(self, name, versions):
        for version in versions:
            with contextlib.suppress(OSError):  # what stays is removed by a later write, or by `remove`
                self._call(self.fs.rm_file, self._path(name, version))

    def _path(self, name, version):
        return f"{self.root}/{name}/{version:010d}"

    # Versions -------------------------------------------------------------------------------------------------------

    def names(self):
        """The names of all sessions that have an object, in no order."""
        return [name for name in self._list(self.root) if NAME.fullmatch(name)]

    def versions(self, name):
        """The numbers of the stored versions, in order."""
        check_name(name)
        return sorted(int(found) for found in self._list(f"{self.root}/{name}") if re.fullmatch(r"\d{10}", found))

    def newest(self, name):
        """The number of the newest version; 0 if there is none."""
        found = self.versions(name)
        # A version whose predecessor is gone was written onto a removed session by an owner that died before it
        # could find out.
        return found[-1] if found and (found[-1] == 1 or found[-1] - 1 in found) else 0

    def read(self, name, version):
        """The bytes of a version.

        Raises:
            FileNotFoundError: if it is gone.
        """
        return self._call(self.fs.cat_file, self._path(name, version))

    def header(self, name, version):
        """The fields in the header of a version.

        Raises:
            FileNotFoundError: if it is gone.
            ValueError: if it is damaged.
        """
        start = self._call(self.fs.cat_file, self._path(name, version), start=0, end=HEADER)
        size = 8 + int.from_bytes(start[:8], "little")
        return safetensors_file.decode_header(
            start if size <= len(start) else self.read(name, version), "a stored session"
        )[0]

    def read_newest(self, name):
        """`(version, bytes)`; NoSuchSession if there is none."""
        while True:
            version = self.newest(name)
            if not version:
                raise missing(name)
            with contextlib.suppress(FileNotFoundError):  # replaced between the two calls
                return version, self.read(name, version)

    def append(self, name, arrays, fields, *, token, keep=()):
        """Writes version `token + 1`, and removes what nobody needs any more.

        Args:
            name: the session.
            arrays, fields: see `safetensors_file.encode`.
            token: the newest version that the writer knows; 0 for a new session.
            keep: versions that stay.

        Returns:
            The new version's number, the writer's next token.

        Raises:
            StaleOwner: if there is another version `token + 1`, or the session is gone; nothing was written.
            OSError: if the store fails, several times. Whether the version was written is then not known: writing on
                top of `token` again finds out.
        """
        check_name(name)
        version, own = token + 1, secrets.token_hex(16)
        ancestors = self._ancestors(name, token) if token else []
        ancestors = [own, *ancestors][:ANCESTORS]
        fields = {**fields, "ancestors": " ".join(ancestors)}
        data = b"".join(bytes(piece) for piece in safetensors_file.encode(arrays, fields))
        path = self._path(name, version)
        try:
            self._call(self.create, path, data)
        except FileExistsError:
            if not self._is_ours(name, version, data):
                raise stale(name, token) from None
        found = self.versions(name)
        newer = [other for other in found if other > version]
        counts = own in self._ancestors(name, newer[-1]) if newer else not token or token in found
        if not counts:
            self._remove(name, [version])
            raise stale(name, token)
        self._remember(name, version, ancestors)
        self._remove(name, [old for old in found if old < token and old not in keep])
        return version

    def _is_ours(self, name, version, data):
        """Whether a create that failed had worked at an earlier attempt."""
        try:
            return self.read(name, version) == data
        except FileNotFoundError:
            return False

    def _ancestors(self, name, version):
        """The ids of a version and those before it; none if it is gone or damaged."""
        known = self._known.get(name)
        if known and known[0] == version:
            return known[1]
        try:
            return self.header(name, version).get("ancestors", "").split()
        except (FileNotFoundError, ValueError):
            return []

    def _remember(self, name, version, ancestors):
        with _LOCKS_GUARD:
            self._known[name] = version, ancestors
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)

    def remove(self, name, version=None):
        """Removes a session, so that its owner's next write is refused. False if there was none.

        A last version that says so comes first: from then on the session is gone for all. With `version`, nothing is
        removed unless that is the newest.
        """
        while newest := self.newest(name):
            try:
                last = self.append(name, {}, {"deleted": "1"}, token=newest if version is None else version)
            except StaleOwner:  # its owner wrote meanwhile
                if version is None:
                    continue
                return False
            self._remove(name, [old for old in self.versions(name) if old < last])
            self._remove(name, [last])  # last, so that no owner finds the version before its own
            break
        else:
            self.remove_rest(name)
            return False
        self.remove_rest(name)
        return True

    def remove_rest(self, name):
        """Removes the folder of a session without versions that count, and what killed writers left in it."""
        if not self.newest(name):
            with contextlib.suppress(OSError):
                self._call(self.fs.rm, f"{self.root}/{name}", recursive=True)


def check_name(name):
    """BadRequest unless `name` can be a session's."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadRequest(
            f"The name of a session is 22 to 128 letters, digits, - or _; received {str(name)!r:.60}. Use the name "
            "that opened it, or take one from `new_name()`.",
            "session",
        )


def missing(name):
    return NoSuchSession(
        f"A session is continued under the name that it was opened with; there is none named {name[:6]}…, or it has "
        'expired. Open one with `"session": "new"`, or `put`.',
        "session",
    )


def stale(name, token):
    return StaleOwner(
        f"A session is written on top of its newest version; that of {name[:6]}… is no longer {token}, since another "
        "owner wrote or deleted it. Nothing was written: read it again, then write on top of what you read.",
        "session",
    )
