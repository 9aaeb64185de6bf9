"""Serving streams: sessions in a store, continuous batching, and an OpenAI-compatible server on Ray Serve.

- `store.py`, `object_log.py`: sessions under unguessable names on anything that fsspec reaches, one owner at a time.
- `engine.py`, with `turn.py`, `rows.py` and `ledger.py`: one model and many sessions; no network, no cluster.
- `http.py`: the HTTP face, over anything that runs turns.
- `ray_app.py`: replicas of the engine behind that face, on Ray Serve; `python -m keras_fam.serve` starts it.
"""

from keras_fam.serve.engine import SessionEngine
from keras_fam.serve.errors import (
    BadRequest,
    DamagedSession,
    Full,
    NoSuchSession,
    ServeError,
    SessionBusy,
    StaleOwner,
    Unavailable,
)
from keras_fam.serve.store import SessionStore
from keras_fam.serve.turn import Before, Request, Turn

__all__ = [
    "BadRequest",
    "Before",
    "DamagedSession",
    "Full",
    "NoSuchSession",
    "Request",
    "ServeError",
    "SessionBusy",
    "SessionEngine",
    "SessionStore",
    "StaleOwner",
    "Turn",
    "Unavailable",
]
