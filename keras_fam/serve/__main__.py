"""Serves a language model over HTTP, with sessions that survive their server.

    KERAS_BACKEND=jax python -m keras_fam.serve model.keras --store sessions --replicas 2
    KERAS_BACKEND=jax python -m keras_fam.serve my_preset --store s3://bucket/sessions --address auto --max-replicas 8

The first starts Ray on this machine and stops it at the end; the second runs on a cluster that is there.
"""

import argparse
import contextlib
import os
import signal
import threading

from keras_fam.serve.ray_app import APP, import_ray, make_application
from keras_fam.serve.text import FORMATS

# Serve ends the process that answers HTTP if it is silent for three times so many seconds: by default 5 at the start
# and 10 later, which is too short for a busy machine.
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m keras_fam.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a .keras file, the folder of a preset, or package.module:function")
    parser.add_argument("--store", required=True, help="a folder, or a URL of fsspec: s3://, gs://, …")
    parser.add_argument("--expire-after", type=float, help="seconds after which an unused session is gone")
    parser.add_argument("--model-name", help="what clients call the model; by default the last part of MODEL")
    parser.add_argument("--chat", choices=FORMATS, default="plain", help="how messages are written for the model")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", help="of a Ray cluster, or auto; without it, Ray is started here")
    parser.add_argument("--proxies", choices=["EveryNode", "HeadOnly"], default="EveryNode", help="where HTTP comes in")
    parser.add_argument("--replicas", type=int, default=1, help="processes that hold the model")
    parser.add_argument("--max-replicas", type=int, help="lets Ray start more of them while turns wait")
    parser.add_argument("--rows", type=int, default=8, help="turns that a replica runs at a time")
    parser.add_argument("--max-waiting", type=int, default=64, help="turns that may wait in a replica")
    parser.add_argument("--save-every", type=int, default=1024, help="tokens of a turn after which it is stored")
    parser.add_argument("--cpus-per-replica", type=float, default=1)
    parser.add_argument("--gpus-per-replica", type=float, default=0)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    with running(args):
        print(f"Serving at http://{args.host}:{args.port}/v1; Ctrl-C ends it.", flush=True)
        done.wait()


def deploy(args):
    """Runs the application of parsed arguments in the Ray that is connected; again, with other `replicas`, it grows or
    shrinks. Waits until its replicas are there."""
    application = make_application(
        args.model,
        {"url": args.store, "expire_after": args.expire_after},
        model_name=args.model_name,
        chat=FORMATS[args.chat],
        replicas=args.replicas,
        max_replicas=args.max_replicas,
        rows=args.rows,
        max_waiting=args.max_waiting,
        save_every=args.save_every,
        num_cpus=args.cpus_per_replica,
        num_gpus=args.gpus_per_replica,
    )
    import_ray().serve.run(application, name=APP, route_prefix="/")


def patiently(start, errors, attempts=5):
    """Calls `start` again after one of `errors`: on a busy machine Serve's processes take longer than it waits for
    them, and go on starting, or are restarted."""
    for left in reversed(range(attempts)):
        try:
            return start()
        except errors:
            if not left:
                raise


@contextlib.contextmanager
def running(args):
    """The server of parsed arguments, for as long as the block lasts."""
    ray = import_ray()
    if args.address is None:
        for name, seconds in PATIENCE.items():
            os.environ.setdefault(name, seconds)  # read by the processes that Ray starts
    ray.init(address=args.address or "local", include_dashboard=False, log_to_driver=False)
    try:
        http = {"host": args.host, "port": args.port}
        slow = (TimeoutError, ray.exceptions.RayActorError)
        patiently(lambda: ray.serve.start(proxy_location=args.proxies, http_options=http), slow)
        try:
            deploy(args)
            yield
        finally:
            ray.serve.delete(APP)
            if args.address is None:
                ray.serve.shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
