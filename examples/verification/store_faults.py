"""Sessions against a store that fails, two engines at once, and what nobody may do:

    KERAS_BACKEND=jax python -m examples.verification.store_faults --out out/store_faults.json

Clients send each turn to one of two engines, which share a store; a tenth of the store's calls fail, half of these
after they had their effect. A turn that is refused is sent again, with the same id, to either engine. Then every
session is compared with a private stream that has the same turns. After that: guessed names, stale owners, damage.
"""

import argparse
import collections
import concurrent.futures
import json
import pathlib
import random
import tempfile
import time
import uuid

import keras

import keras_fam
from examples.record import run_record
from examples.serving.small_model import VOCABULARY, small_model
from keras_fam.serve import (
    DamagedSession,
    Request,
    ServeError,
    SessionBusy,
    SessionEngine,
    SessionStore,
    StaleOwner,
    Unavailable,
)


class Failing(SessionStore):
    """A store, a share of whose calls raise OSError, before or after they had their effect."""

    def __init__(self, url, share, seed, attempts):
        super().__init__(url, attempts=attempts)
        self.calls, self.failed, draw, call = 0, 0, random.Random(seed), self.log._call

        def shaky(function, *args, **kwargs):
            def once(*args, **kwargs):
                chance = draw.random()
                self.calls += 1
                self.failed += chance < share
                if chance < share / 2:
                    raise OSError("The store is not there.")
                result = function(*args, **kwargs)
                if chance < share:
                    raise OSError("The answer was lost.")
                return result

            return call(once, *args, **kwargs)

        self.log._call = shaky


def talk(number, names, engines, turns, tokens):
    """One session's turns, each sent until it is answered: `(what was said, refusals by code)`."""
    draw, said, refused = random.Random(number), [], collections.Counter()
    for turn in range(turns):
        prompt, again = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 40))], uuid.uuid4().hex
        while True:
            request = Request(prompt, tokens, session=names[number], create=not turn, request_id=again)
            try:
                done = draw.choice(engines).submit(request)
                said.append((prompt, done.result(), done.position))
                break
            except (Unavailable, SessionBusy) as error:
                refused[error.code] += 1
                time.sleep(0.01)
    return said, refused


def refusals(lm, store, name):
    """How many of some attempts to do what nobody may do were refused, by kind."""
    found, stream = collections.Counter(), keras_fam.StreamingModel(lm, 1)

    def attempt(kind, error, function, *args, **kwargs):
        found[f"{kind}, tried"] += 1
        try:
            function(*args, **kwargs)
        except error:
            found[f"{kind}, refused"] += 1

    for i in range(1000):
        for guess in (str(i), f"{i:022d}", name[:-1] + chr(ord("A") + i % 26), store.new_name()):
            if guess != name:
                attempt("guessed names", ServeError, store.get, guess, stream)
    token = store.get(name, stream)
    for i in range(100):
        stale = token
        token = store.put(name, stream, token=token)
        attempt("stale owners", StaleOwner, store.put, name, stream, token=random.Random(i).randint(0, stale))
    path, data = store.log._path(name, token), store.log.read(name, token)
    draw = random.Random(0)
    for _ in range(300):
        place = draw.randrange(len(data))
        damaged = data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
        pathlib.Path(path).write_bytes(damaged if draw.random() < 0.7 else data[:place])
        attempt("damaged sessions", DamagedSession, store.get, name, stream)
    pathlib.Path(path).write_bytes(data)
    store.get(name, stream)
    return dict(found)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--turns", type=int, default=30, help="of each session")
    parser.add_argument("--tokens", type=int, default=12, help="generated in a turn")
    parser.add_argument("--share", type=float, default=0.1, help="of the store's calls that fail")
    parser.add_argument("--attempts", type=int, default=2, help="of the store for each call, so that turns fail, too")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args(argv)
    lm = small_model()
    with tempfile.TemporaryDirectory() as folder:
        stores = [Failing(folder, args.share, seed, args.attempts) for seed in range(2)]
        engines = [SessionEngine(lm, store, rows=4, save_every=16) for store in stores]
        names = [stores[0].new_name() for _ in range(args.sessions)]
        try:
            with concurrent.futures.ThreadPoolExecutor(args.sessions) as pool:
                results = list(
                    pool.map(lambda n: talk(n, names, engines, args.turns, args.tokens), range(args.sessions))
                )
            counts = [engine.snapshot() for engine in engines]
        finally:
            for engine in engines:
                engine.close()
        wrong, refused, stream = 0, collections.Counter(), keras_fam.StreamingModel(lm, 1)
        for said, codes in results:
            stream.reset_state()
            refused += codes
            for prompt, tokens, position in said:
                expected = stream.generate([prompt], max_new_tokens=args.tokens)[0]
                wrong += bool(tokens != expected or position != int(stream.position[0]))
        attempts = refusals(lm, SessionStore(folder), names[0])
    result = {
        **run_record("examples.verification.store_faults", args, argv),
        "turns": sum(len(said) for said, _ in results),
        "wrong": wrong,
        "store_calls": sum(store.calls for store in stores),
        "store_failures": sum(store.failed for store in stores),
        "refused_turns": dict(refused),
        "resumed": sum(found["resumed"] for found in counts),
        "replayed": sum(found["replayed"] for found in counts),
        "attempts": attempts,
    }
    print(
        f"{keras.backend.backend()}: {result['turns']} turns of {args.sessions} sessions, {wrong} differ from private "
        f"streams; {result['store_failures']} of {result['store_calls']} calls of the store failed; turns refused and "
        f"sent again: {dict(refused)}; {result['replayed']} answered as done, {result['resumed']} resumed in the middle"
    )
    for kind in ("guessed names", "stale owners", "damaged sessions"):
        print(f"{kind}: {attempts[f'{kind}, refused']} of {attempts[f'{kind}, tried']} refused")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
