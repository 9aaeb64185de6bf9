"""Replicas of an engine on Ray Serve. Ray places and restarts them, routes requests, and scales.

```
client ── HTTP ──► Ray's proxy ──► Ingress (http.py) ── call, routed by session ──► Replica (worker.py, engine.py)
                                                                                      │        ▲
                                                                                      ▼        │
                                                                                   store of sessions
```

A request goes to the replica that holds its session, by Serve's routing of multiplexed models: the id is a hash of the
session's name, since Ray writes ids to its logs and metrics. That is for speed alone. Wherever a request goes, the
replica compares what it holds with the store; and the store lets one owner write.

If a replica is lost in a turn, the ingress gives the same call to another one. That one finds in the store how far the
turn came, goes on, and the ingress passes on what the client has not had. So a client sees a pause.
"""

import asyncio
import contextlib
import hashlib
import importlib
import os
import pathlib
import re

import keras

from keras_fam.models.transformer_fam_causal_lm import TransformerFAMCausalLM
from keras_fam.serve.engine import SessionEngine
from keras_fam.serve.errors import BadRequest, Full
from keras_fam.serve.http import make_app
from keras_fam.serve.protocol import error_event, unavailable
from keras_fam.serve.store import SessionStore
from keras_fam.serve.text import ChatFormat
from keras_fam.serve.worker import Worker

ENGINE, APP = "Replica", "keras_fam"
PATIENCE = 60.0  # seconds in which a turn is given to other replicas, once its own is lost
PAUSE = 0.25  # seconds between two attempts
LONGEST_TURN = 3600.0  # seconds that an ingress which is replaced goes on answering what it has begun


def import_ray():
    """`ray`, with `ray.serve`."""
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise ImportError("The server runs on Ray Serve: pip install 'keras-fam[ray]'.") from error
    return ray


def load_model(source):
    """A built language model from a `.keras` file, a preset's folder, or `"package.module:function"`, which returns it.

    Raises:
        BadRequest: if it is none of these, or no `TransformerFAMCausalLM`.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        model = TransformerFAMCausalLM.from_preset(path)
    elif path.is_file():
        model = keras.saving.load_model(path, compile=False)
    elif re.fullmatch(r"[\w.]+:\w+", source):
        module, _, function = source.partition(":")
        model = getattr(importlib.import_module(module), function)()
    else:
        raise BadRequest(
            "A model is a .keras file, the folder of a preset, or `package.module:function`; there is no such file or "
            f"folder: {source!r}."
        )
    if not isinstance(model, TransformerFAMCausalLM):
        raise BadRequest(f"A server runs a TransformerFAMCausalLM; {source!r} is a {type(model).__name__}.")
    if not model.built:
        model.build()
    return model


def make_application(
    model,
    store,
    *,
    model_name=None,
    chat=None,
    replicas=1,
    max_replicas=None,
    rows=8,
    max_waiting=64,
    save_every=1024,
    num_cpus=1,
    num_gpus=0,
    app_name=APP,
):
    """An application for `ray.serve.run(application, name=app_name)`.

    Args:
        model: what `load_model` takes; every replica loads it.
        store: a URL, or a dict of `SessionStore`'s arguments. All replicas have to reach it: not `memory://`.
        model_name: what clients call the model; `model`'s last part if None.
        chat: `ChatFormat`.
        replicas: how many processes hold the model.
        max_replicas: None, or up to how many Ray starts while turns wait; `replicas` is then the least.
        rows, max_waiting, save_every: see `SessionEngine`.
        num_cpus, num_gpus: what Ray reserves for a replica.
        app_name: the name that it is run under.

    Raises:
        BadRequest: for a store in the memory of one process.
        ImportError: without Ray.
    """
    serve = import_ray().serve
    store = {"url": str(store)} if not isinstance(store, dict) else dict(store)
    if "://" not in str(store["url"]):  # replicas have folders of their own
        store["url"] = os.path.abspath(store["url"])
    if str(store["url"]).startswith("memory:"):
        raise BadRequest(
            "Replicas share their store of sessions; memory:// is one process's. Give a folder or a bucket."
        )
    if os.path.exists(model):
        model = os.path.abspath(model)
    name = model_name or pathlib.Path(model.rpartition(":")[2]).stem
    engine = {"rows": rows, "max_waiting": max_waiting, "save_every": save_every}
    scale = {"num_replicas": replicas}
    if max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": rows,
            }
        }
    replica = serve.deployment(
        Replica,
        name=ENGINE,
        max_ongoing_requests=rows + max_waiting,
        max_queued_requests=max_waiting,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=60,
        ray_actor_options={
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": {"KERAS_BACKEND": keras.backend.backend()}},
        },
        **scale,
    ).bind(model, store, engine, chat)

    def build():
        return make_app(Replicas(serve.get_deployment_handle(ENGINE, app_name=app_name)), name)

    ingress = serve.deployment(
        serve.ingress(build)(),
        name="Ingress",
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=LONGEST_TURN,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replica)


class Replica:
    """One process with a model: an engine behind Ray Serve."""

    def __init__(self, model, store, engine, chat=None):
        serve = import_ray().serve
        engine = SessionEngine(load_model(model), SessionStore(**store), **engine)
        name = serve.get_replica_context().replica_id.unique_id
        self.worker = Worker(engine, chat or ChatFormat(), name)

        async def hold(session):
            return session

        # Which sessions are here is what Serve routes by; the engine has as many at hand.
        self._hold = serve.multiplexed(hold, max_num_models_per_replica=len(engine._rows))

    async def turn(self, call):
        """See `Worker.turn`."""
        if call["session"] is not None:
            await self._hold(routing_id(call["session"]))
        async with contextlib.aclosing(self.worker.turn(call)) as events:
            async for event in events:
                yield event

    async def delete(self, session):
        return await self.worker.delete(session)

    async def place(self, session):
        return await self.worker.place(session)

    async def statistics(self):
        return {name: {**found, "pid": os.getpid()} for name, found in (await self.worker.statistics()).items()}

    def check_health(self):
        """Called by Ray, which replaces a replica where this raises."""
        if not self.worker.engine.healthy():
            raise RuntimeError("The thread that steps the engine has ended.")

    def __del__(self):
        if hasattr(self, "worker"):
            self.worker.engine.close()


class Replicas:
    """All replicas, as one `Worker`: calls go to one of them, and to another one if that is lost."""

    def __init__(self, handle):
        self.handle = handle

    async def turn(self, call):
        """See `Worker.turn`; tokens that were given out are not given out again."""
        ray, loop = import_ray(), asyncio.get_running_loop()
        lost = (ray.exceptions.RayError, ray.serve.exceptions.DeploymentUnavailableError, ConnectionError)
        handle = self.handle.options(stream=True, multiplexed_model_id=routing_id(call["session"] or ""))
        given, end, reason = 0, None, ""
        while end is None or loop.time() < end:
            try:
                events = handle.turn.remote(call)
                try:
                    async for event in events:
                        if event.get("status") == 503:  # a replica that is shut down
                            reason = event["error"]["message"]
                            break
                        event = _without(event, given)
                        given += len(event.get("tokens", ()))
                        end = None
                        if event.get("tokens") or "index" not in event:
                            yield event
                        if "index" not in event:
                            return
                finally:
                    events.cancel()  # of a turn that ended, nothing; or its client has gone
            except ray.serve.exceptions.BackPressureError:
                yield error_event(Full("All replicas are full; nothing was read. Send the same request again, later."))
                return
            except lost as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            end = end or loop.time() + PATIENCE
            await asyncio.sleep(PAUSE)
        yield unavailable(reason)

    async def delete(self, session):
        return await self._any("delete", session)

    async def place(self, session):
        return await self._any("place", session)

    async def _any(self, method, session):
        handle = self.handle.options(multiplexed_model_id=routing_id(session))
        try:
            return await getattr(handle, method).remote(session)
        except import_ray().exceptions.RayError as error:
            return unavailable(str(error))

    async def statistics(self):
        """Of the replicas that answer."""
        response = self.handle.broadcast("statistics")
        found = await response.results_async(timeout_s=10, return_exceptions=True)
        return {name: snapshot for part in found if isinstance(part, dict) for name, snapshot in part.items()}


def routing_id(session):
    """What stands for a session's name where others may read it; none for a call without one."""
    return hashlib.sha256(session.encode()).hexdigest()[:32] if session else ""


def _without(event, given):
    """An event without tokens that an earlier replica has given out."""
    known = given - event["index"] if "index" in event else 0
    if known <= 0:
        return event
    return {"index": given, "tokens": event["tokens"][known:], "pieces": event["pieces"][known:]}
