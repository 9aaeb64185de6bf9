"""Clients, sessions and losses: a server under Ray Serve whose processes are killed and moved at random moments:

    KERAS_BACKEND=torch python -m examples.serving.ray_drill --out out/ray_drill.json
    KERAS_BACKEND=torch python -m examples.serving.ray_drill --nodes 2 --node-kills 5 --resizes 10 --kills 10

Clients (OpenAI's) talk to sessions, whole and streamed, while replicas are killed (SIGKILL), `--resizes` let the server
shrink to one replica and grow again, and `--node-kills` take a whole node of Ray's, with its replicas and its part of
the object store, as the loss of a machine does; `--nodes` are simulated on this machine. Afterwards every session's
turns are done again by a private stream: each token of each turn has to be the same, and where the session stands. A
token that is lost or said twice, or a session that is gone is counted. A request that fails is counted, and sent again
with the same `Idempotency-Key`, as a client does whose connection broke: with a node, the process that answers HTTP may
be lost.
"""

import argparse
import contextlib
import copy
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import tempfile
import threading
import time
import uuid

import keras_fam
from examples.record import run_record
from examples.serving.small_model import small_text_model
from keras_fam.serve import SessionStore, ray_app
from keras_fam.serve.__main__ import deploy, make_parser, running

MODEL = "small_text_model"
LONGEST_WAIT = 600  # seconds in which a client sends a request again
TEXT = "It is a truth universally acknowledged that a single man in possession of a good fortune"


class Drill:
    """What the clients did, in order, session by session."""

    def __init__(self, args, url):
        self.args, self.url = args, url
        self.turns = {number: [] for number in range(args.sessions)}  # (prompt, count, tokens, position)
        self.names, self.errors, self.again, self.latencies, self.done = {}, [], [], [], 0
        self.lock = threading.Lock()

    def client(self, number, requests):
        """Opens the client's sessions, then talks to them at random."""
        import openai

        client = openai.OpenAI(base_url=self.url, api_key="none", timeout=300, max_retries=0)
        draw, mine = random.Random(number), range(number, self.args.sessions, self.args.clients)
        closed = [session for session in mine if session not in self.names]
        for session in [*closed, *(draw.choice(mine) for _ in range(requests))]:
            prompt, count = TEXT[: draw.randint(1, self.args.prompt)], draw.randint(1, self.args.tokens)
            start = time.perf_counter()
            parts = self.answer(client, session, prompt=prompt, max_tokens=count, stream=draw.random() < 0.5)
            with self.lock:
                if parts is None:
                    self.errors.append(f"session {session}: no answer within {LONGEST_WAIT} s")
                    continue
                self.names[session] = parts[-1].session
                tokens = [token for part in parts for token in part.choices[0].token_ids]
                self.turns[session].append((prompt, count, tokens, parts[-1].position))
                self.latencies.append((start, time.perf_counter()))
                self.done += 1

    def answer(self, client, session, **options):
        """The answer in parts; a request that fails is sent again. None after `LONGEST_WAIT`."""
        import openai

        own = {"session": self.names.get(session, "new")}
        headers, end = {"Idempotency-Key": uuid.uuid4().hex}, time.perf_counter() + LONGEST_WAIT
        options |= {"model": MODEL, "temperature": 0, "extra_body": own, "extra_headers": headers}
        while time.perf_counter() < end:
            try:
                found = client.completions.create(**options)
                return list(found) if options["stream"] else [found]
            except openai.APIError as error:
                with self.lock:
                    self.again.append(f"{getattr(error, 'status_code', None)}: {str(error)[:300]}")
                time.sleep(1)
        return None

    def run(self, requests, beside=None):
        """All clients, with `beside()` in this thread; seconds."""
        share, start = requests // self.args.clients, time.perf_counter()
        threads = [threading.Thread(target=self.client, args=(n, share)) for n in range(self.args.clients)]
        for thread in threads:
            thread.start()
        if beside is not None:
            beside(lambda: any(thread.is_alive() for thread in threads))
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def compare(self, lm):
        """Does every turn again in private streams: what differs, as `(turns, sessions)`."""
        tokenizer, wrong_turns, wrong_sessions = lm.preprocessor.tokenizer, 0, 0
        stream = keras_fam.StreamingModel(lm, 1)
        for turns in self.turns.values():
            stream.reset_state()
            wrong = 0
            for prompt, count, tokens, position in turns:
                expected = stream.generate(
                    [tokenizer(prompt)], max_new_tokens=count, stop_token_ids=[tokenizer.end_token_id]
                )[0]
                wrong += bool(tokens != expected or position != int(stream.position[0]))
            wrong_turns, wrong_sessions = wrong_turns + wrong, wrong_sessions + bool(wrong)
        return wrong_turns, wrong_sessions


def engines():
    """Statistics of the engines that answer, by name; none while all replicas are lost."""
    from ray import serve

    handle = serve.get_deployment_handle(ray_app.ENGINE, app_name=ray_app.APP)
    try:
        found = handle.broadcast("statistics").results(timeout_s=30, return_exceptions=True)
    except (serve.exceptions.DeploymentUnavailableError, TimeoutError):
        return {}
    return {name: part[name] for part in found if isinstance(part, dict) for name in part}


def resident(found):
    """Resident bytes of the engines' processes."""
    pages = {name: int(pathlib.Path(f"/proc/{s['pid']}/statm").read_text().split()[1]) for name, s in found.items()}
    return {name: count * os.sysconf("SC_PAGE_SIZE") for name, count in pages.items()}


@contextlib.contextmanager
def ray_nodes(count):
    """Several nodes of Ray on this machine beside a head without replicas; yields the cluster, or None for none."""
    if not count:
        yield None
        return
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


class Losses:
    """What happens to the server at random moments, spread over the requests: `run` lets it happen, `log` has it."""

    def __init__(self, drill, args, server, cluster):
        self.drill, self.args, self.server, self.cluster, self.log = drill, args, copy.copy(server), cluster, []
        self.draw, self.replicas = random.Random(0), args.replicas
        kinds = [self.kill] * args.kills + [self.resize] * args.resizes + [self.kill_node] * args.node_kills
        self.draw.shuffle(kinds)
        moments = sorted(self.draw.uniform(0.02, 0.97) * args.requests for _ in kinds)
        self.plan = list(zip(moments, kinds, strict=True))

    def run(self, going):
        for moment, happen in self.plan:
            while going() and self.drill.done - self.args.sessions + len(self.drill.errors) < moment:
                time.sleep(0.01)
            time.sleep(self.draw.uniform(0, 0.2))
            while going() and not happen():
                time.sleep(0.2)

    def note(self, kind, **more):
        self.log.append({"kind": kind, "at": time.perf_counter(), **more})
        return True

    def kill(self):
        """One replica's process ends at once."""
        found = engines()
        if not found:
            return False
        name = self.draw.choice(sorted(found))
        with contextlib.suppress(ProcessLookupError):  # Ray ended it meanwhile
            os.kill(found[name]["pid"], signal.SIGKILL)
            return self.note("replica killed", running=found[name]["running"], of=len(found))
        return False

    def resize(self):
        """All replicas but one are shut down; the next time they come back."""
        self.server.replicas = 1 if self.server.replicas > 1 else self.replicas
        done = self.note("server resized", replicas=self.server.replicas)
        deploy(self.server)
        return done

    def kill_node(self):
        """A node's processes end at once, its replicas with them; a new node takes its place."""
        node = self.draw.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id))
        done = self.note("node killed", of=len(self.cluster.worker_nodes))
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(num_cpus=1)
        return done


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="while replicas are killed")
    parser.add_argument("--quiet", type=int, default=2000, help="requests after that, to measure resident memory")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20, help="of replicas")
    parser.add_argument("--resizes", type=int, default=0, help="to one replica, or back to all of them")
    parser.add_argument("--nodes", type=int, default=0, help="of Ray, simulated; 0: Ray's embedded cluster")
    parser.add_argument("--node-kills", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=24, help="characters of a prompt, at most")
    parser.add_argument("--tokens", type=int, default=16, help="tokens generated in a turn, at most")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=16)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args(argv)
    if args.node_kills and not args.nodes:
        parser.error("--node-kills needs --nodes, of which at least one is left")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    memory = []
    with tempfile.TemporaryDirectory() as store, ray_nodes(args.nodes) as cluster:
        server = make_parser().parse_args(
            f"examples.serving.small_model:{MODEL} --store {store} --replicas {args.replicas} --rows {args.rows} "
            f"--save-every {args.save_every} --cpus-per-replica 0.1 --port {port}".split()
            + (["--address", cluster.address, "--proxies", "HeadOnly"] if cluster else [])
        )
        with running(server):
            drill = Drill(args, f"http://127.0.0.1:{port}/v1")
            drill.run(0)
            losses = Losses(drill, args, server, cluster)
            seconds = drill.run(args.requests, losses.run)
            latencies, errors, kills = list(drill.latencies), list(drill.errors), losses.log
            print(f"{len(latencies)} turns, {len(errors)} errors, {len(kills)} losses, {seconds:.0f} s", flush=True)
            deploy(server)
            while len(engines()) < args.replicas:
                time.sleep(0.5)
            parts = 5
            quiet_seconds = 0.0
            for _ in range(parts):
                quiet_seconds += drill.run(args.quiet // parts)
                memory.append(resident(engines()))
            after = engines()
        stored = len(SessionStore(store).list())
    wrong_turns, wrong_sessions = drill.compare(small_text_model())
    took = [end - start for start, end in latencies]
    # Of each kill: when the last of the requests that were under way was answered.
    waits = [
        max((end - kill["at"] for start, end in latencies if start <= kill["at"] <= end), default=0.0) for kill in kills
    ]
    names = set(memory[0]) & set(memory[-1])
    growth = {name: memory[-1][name] / memory[0][name] - 1 for name in sorted(names)}
    result = {
        **run_record("examples.serving.ray_drill", args, argv),
        "turns": drill.done,
        "tokens": sum(len(tokens) for turns in drill.turns.values() for _, _, tokens, _ in turns),
        "errors": drill.errors,
        "sent_again": drill.again,
        "wrong_turns": wrong_turns,
        "wrong_sessions": wrong_sessions,
        "sessions": len(drill.names),
        "sessions_stored": stored,
        "kills": [{key: value for key, value in kill.items() if key != "at"} for kill in kills],
        "recovery_seconds": {"each": waits, "median": statistics.median(waits or [0]), "largest": max(waits or [0])},
        "request_seconds": {"median": statistics.median(took), "p99": sorted(took)[int(0.99 * len(took))]},
        "requests_per_second": {"with_kills": len(took) / seconds, "quiet": args.quiet / quiet_seconds},
        "resident_growth": growth,
        "resident_bytes": memory,
        "engines": {
            name: {key: s[key] for key in ("turns", "resumed", "replayed", "loads")} for name, s in after.items()
        },
    }
    print(
        f"{result['turns']} turns and {result['tokens']:,} tokens of {result['sessions']} sessions; "
        f"{len(drill.errors)} errors, {len(drill.again)} requests sent again; {wrong_turns} turns differ from private "
        f"streams; {stored} sessions stored"
    )
    recovery, usual = result["recovery_seconds"], result["request_seconds"]["median"]
    print(
        f"after a kill, all requests under way were answered within {recovery['median']:.1f} s in the median and "
        f"{recovery['largest']:.1f} s at most; a request takes {usual:.3f} s in the median; resident memory of the "
        f"replicas over {args.quiet} requests: " + ", ".join(f"{100 * change:+.1f} %" for change in growth.values())
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
