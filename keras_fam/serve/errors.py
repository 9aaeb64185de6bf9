"""What a call for a stream can be refused with; each error knows its HTTP status."""


class ServeError(Exception):
    """Base. `str(error)` states the rule, the value received and the remedy.

    Attributes:
        status: the HTTP status that says the same.
        code: a short name for programs, `error.code` in responses.
        param: None, or the name of the request's field.
    """

    status, code = 500, "server_error"

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def __reduce__(self):  # errors cross process boundaries
        return type(self), (str(self), self.param)


class BadRequest(ServeError, ValueError):
    """A request that does not fit."""

    status, code = 400, "invalid_request"


class NoSuchSession(ServeError, LookupError):
    """A session that was never opened, was deleted, or has expired."""

    status, code = 404, "session_not_found"


class SessionBusy(ServeError):
    """Another turn of the session runs."""

    status, code = 409, "session_busy"


class StaleOwner(SessionBusy):
    """A write on top of a version that is no longer the newest: another owner wrote meanwhile. It was not kept."""

    code = "session_moved"


class Full(ServeError):
    """No room for another turn now."""

    status, code = 429, "server_full"


class DamagedSession(ServeError, ValueError):
    """A stored session that is not as it was written, or belongs to another model."""

    status, code = 500, "session_damaged"


class Unavailable(ServeError):
    """The store, or the process that ran a turn, did not answer; the turn was not kept."""

    status, code = 503, "unavailable"
