"""Sessions in a store that several processes and machines reach: a folder, a bucket, or this process's memory."""

import json
import os
import secrets
import time
from typing import NamedTuple

from keras import ops

from keras_fam.serve.errors import BadRequest, DamagedSession
from keras_fam.serve.object_log import ObjectLog, check_name, missing
from keras_fam.streaming import session
from keras_fam.utils import safetensors_file

ABANDONED = 3600  # seconds after which a folder without any version is what a killed writer left


class Stored(NamedTuple):
    """A session as it is stored.

    Attributes:
        fields: dict of str to str, the header.
        arrays: dict of names to NumPy arrays.
        version: which version this is.
        token: the number of the newest version; what to write on top of.
    """

    fields: dict
    arrays: dict
    version: int
    token: int

    @property
    def record(self):
        """What was kept beside the streams (`record` of `write`), or None."""
        return json.loads(self.fields["record"]) if "record" in self.fields else None


class SessionStore:
    """Streams under names that nobody can guess, on anything that fsspec reaches.

    ```python
    store = keras_fam.serve.SessionStore("s3://bucket/sessions", expire_after=30 * 86400)  # or a folder
    name = store.new_name()
    token = store.put(name, stream)                        # row 0 of a `StreamingModel`
    token = store.put(name, stream, token=token)           # again, on top of what was written
    token = store.get(name, other, row=3)                  # elsewhere, under any backend: row 3 of `other` goes on
    store.delete(name)
    ```

    A session is kept in the format of `save_state`: with the model's signature, a fingerprint of its weights and a
    digest of every byte. It appears whole or not at all.

    **One owner at a time.** Every write names the version that it continues, its fencing token, and gets the next one.
    Of two owners that hold the same version, one writes; every write of the other is refused with `StaleOwner`, until
    it has read again. This holds wherever creating an object is exclusive and atomic: local folders with hard links
    (NFS included), `memory://` within a process, S3, Google Cloud Storage and Azure Blob Storage. A store that lets a
    name be created twice is refused when it is opened, and one of another kind unless you vouch for it.

    **Expiry.** A session that was not written for `expire_after` seconds is not there any more, by the clock of the
    reader; `sweep` removes such sessions. Nothing else reads clocks.

    Threads and processes may share a store; each makes its own object.

    Args:
        url: a folder, or a URL of fsspec: `memory://…`, `s3://bucket/folder` (needs s3fs), `gs://…` (gcsfs), …
        expire_after: None (never), or seconds since the last write.
        storage_options: None, or a dict for fsspec: keys, endpoints.
        assume_exclusive_create: takes another kind of store, on your word that its `mode="create"` is atomic.
        attempts: how often a call that fails is made before its OSError is raised.

    Raises:
        BadRequest (a ValueError): for a store that does not keep owners apart, or an `expire_after` that is not
            positive.
        ImportError: without fsspec or the package for the URL.
    """

    def __init__(self, url, *, expire_after=None, storage_options=None, assume_exclusive_create=False, attempts=5):
        if expire_after is not None and not expire_after > 0:
            raise BadRequest(f"`expire_after` must be a positive number of seconds; received {expire_after!r}.")
        self.expire_after = expire_after
        self.log = ObjectLog(url, storage_options, assume_exclusive_create=assume_exclusive_create, attempts=attempts)

    # Rows of streams ------------------------------------------------------------------------------------------------

    def new_name(self):
        """A name of 43 characters with 256 random bits. Whoever knows it can read and continue the session."""
        return secrets.token_urlsafe(32)

    def put(self, name, stream, row=0, *, token=0):
        """Writes one row of a `StreamingModel`.

        Args:
            name: str, from `new_name`.
            stream: `StreamingModel`.
            row: its row.
            token: what the last `put` or `get` of this session returned; 0 for a new one.

        Returns:
            int, the token of the next `put`.

        Raises:
            StaleOwner: if another owner wrote meanwhile, or the session was deleted. Nothing was written.
            BadRequest: for a name or a row that cannot be.
            OSError: if the store fails. The same `put` may then be tried again.
        """
        extras = {"position": stream.position[[row]]}
        if not isinstance(stream.next_logits, tuple):
            extras["next_logits"] = ops.convert_to_numpy(stream.next_logits)[[row]]
        return self.write(name, *session.pack(stream.model, stream.get_state([row]), extras), token=token)

    def get(self, name, stream, row=0, *, check_weights=True):
        """Puts the session in the place of one row of a `StreamingModel`.

        Returns:
            int, the token of the next `put`.

        Raises:
            NoSuchSession: if there is none of this name, or it has expired.
            DamagedSession (a ValueError): if it is not as it was written, or of another model. The stream is as it
                was.
            OSError: if the store fails.
        """
        found = self.read(name)
        state, extras = unpack(found, name, stream.model, check_weights=check_weights)
        stream.set_state(state, [row], next_logits=extras.get("next_logits"))
        return found.token

    def list(self):
        """The names of all sessions, expired ones included, in order. Keep it from clients: a name is a key."""
        return sorted(self.log.names())

    def delete(self, name):
        """Removes a session; its owner's next write is refused.

        Raises:
            NoSuchSession: if there is none.
            OSError: if the store fails; call it again.
        """
        check_name(name)
        if not self.log.remove(name):
            raise missing(name)

    def sweep(self):
        """Removes expired sessions; how many. To be called now and then, by anyone."""
        removed = 0
        for name in self.log.names():
            try:
                version = self.log.newest(name)
                if not version and (self.log.versions(name) or self._abandoned(name)):
                    self.log.remove_rest(name)
                elif version and _expired(self.log.header(name, version)):
                    removed += self.log.remove(name, version)  # not what its owner writes meanwhile
            except (OSError, ValueError):  # replaced meanwhile; or damaged, which its owner has to see
                continue
        return removed

    def _abandoned(self, name):
        path = os.path.join(self.log.root, name)
        return self.log.kind == "file" and os.path.getmtime(path) < time.time() - ABANDONED

    # Arrays and fields, for the engine ------------------------------------------------------------------------------

    def write(self, name, arrays, fields, *, token, keep=(), record=None):
        """`put` of what `session.pack` returned.

        Args:
            keep: versions to keep beside the newest two.
            record: None, or something that JSON holds, to be kept beside the streams.
        """
        fields = dict(fields)
        if self.expire_after is not None:
            fields["expires"] = f"{time.time() + self.expire_after:.3f}"
        if record is not None:
            fields["record"] = json.dumps(record)
        return self.log.append(name, arrays, fields, token=token, keep=keep)

    def read(self, name, version=None):
        """The newest version (or another one) as `Stored`. Raises as `get`."""
        check_name(name)
        token, data = self.log.read_newest(name)
        try:
            fields, arrays = safetensors_file.decode(data, _called(name))
            if "deleted" in fields or _expired(fields):
                raise missing(name)
            if version is not None and version != token:
                fields, arrays = safetensors_file.decode(self.log.read(name, version), _called(name))
        except ValueError as error:
            raise DamagedSession(str(error), "session") from error
        except FileNotFoundError as error:
            raise missing(name) from error
        return Stored(fields, arrays, token if version is None else version, token)

    def header(self, name, version=None):
        """`position`, `base` and `token` of a session, from the header of a version (None: the newest) alone.

        Raises as `get`; of damage, only the header's is found.
        """
        check_name(name)
        token = self.log.newest(name)
        try:
            fields = self.log.header(name, token if version is None else version) if token and version != 0 else None
            if fields is None or "deleted" in fields or _expired(fields):
                raise missing(name)
            record = json.loads(fields.get("record", "{}"))
            return {"position": json.loads(fields["position"])[0], "base": record.get("base", token), "token": token}
        except FileNotFoundError as error:
            raise missing(name) from error
        except ValueError as error:
            raise DamagedSession(str(error), "session") from error

    def token(self, name):
        """The number of the newest version; 0 if there is none. Reads no session."""
        return self.log.newest(name)


def unpack(found, name, model, *, check_weights=True, identity=None):
    """`(state, extras)` of a `Stored`; DamagedSession if it does not fit the model."""
    try:
        return session.unpack(
            found.fields, found.arrays, _called(name), model, check_weights=check_weights, identity=identity
        )
    except ValueError as error:
        raise DamagedSession(str(error), "session") from error


def _called(name):
    return f"session {name[:6]}…"


def _expired(fields):
    return "expires" in fields and time.time() > float(fields["expires"])
