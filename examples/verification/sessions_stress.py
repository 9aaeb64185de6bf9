"""Many sessions, many threads: random calls against one loaded export, checked against private streams in Keras.

    python -m examples.verification.sessions_stress [--sessions 64] [--threads 8] [--calls 10000]

Every call works on 1 to 3 sessions that no other call is using: append, append_last, generate (greedy and sampled),
reset, close and open again. Afterwards each session's history is read once more by a `StreamingModel` of its own, and
every number that the server returned is compared. In a second part all threads call one session. Ends with an error if
a difference exceeds 1e-5 of the session's largest logit, or if a call, a token or a session is lost.
"""

import argparse
import os
import tempfile
import threading
import time

import numpy as np

TOLERANCE = 1e-5
NOTHING = np.zeros((0,), "int32")


def resident():
    """Resident memory of this process in MiB (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Server:
    """A loaded export, called as a server would: by signature name, from any thread."""

    def __init__(self, folder):
        import tensorflow as tf

        self.tf, self.signatures = tf, tf.saved_model.load(str(folder)).signatures

    def __call__(self, signature, **inputs):
        function = self.signatures[signature]
        specs = function.structured_input_signature[1]
        inputs = {name: self.tf.constant(x, specs[name].dtype) for name, x in inputs.items()}
        return {name: x.numpy() for name, x in function(**inputs).items()}


class History:
    """One session from its start or reset on: the tokens it read, and what the server returned for them."""

    def __init__(self):
        self.tokens, self.logits, self.choices = [], [], []

    def __len__(self):
        return sum(len(part) for part in self.tokens)


class Stress:
    """`calls` random calls by several threads."""

    def __init__(self, server, places, threads, calls, vocabulary):
        self.server, self.threads, self.vocabulary = server, threads, vocabulary
        self.numbers = [int(n) for n in server("open", count=places)["sessions"]]
        self.histories = [[History()] for _ in range(places)]
        self.idle, self.guard, self.left = list(range(places)), threading.Lock(), calls
        self.counts, self.memory, self.errors = {}, [], []

    def run(self):
        workers = [threading.Thread(target=self._work, args=(i,)) for i in range(self.threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self.errors:
            raise self.errors[0]

    def _work(self, seed):
        rng = np.random.default_rng(seed)
        try:
            while True:
                with self.guard:
                    if not self.left or self.errors:
                        return
                    self.left -= 1
                    if self.left % 100 == 0:
                        self.memory.append(resident())
                    rng.shuffle(self.idle)
                    places = [self.idle.pop() for _ in range(rng.integers(1, 4))]
                kind = rng.choice(
                    ["append", "append_last", "generate", "reset", "reopen"], p=[0.55, 0.15, 0.2, 0.05, 0.05]
                )
                getattr(self, str(kind))(places, rng)
                with self.guard:
                    self.counts[str(kind)] = self.counts.get(str(kind), 0) + 1
                    self.idle.extend(places)
        except BaseException as error:
            self.errors.append(error)

    def _chunk(self, places, rng, smallest):
        """Random tokens of random lengths for some sessions."""
        lengths = rng.integers(smallest, rng.choice([2, 4, 20]), len(places)).astype("int32")
        ids = rng.integers(0, self.vocabulary, (len(places), max(1, lengths.max()))).astype("int32")
        return {"sessions": [self.numbers[p] for p in places], "token_ids": ids, "lengths": lengths}

    def _check_positions(self, places, results):
        for place, position in zip(places, results["positions"], strict=True):
            assert len(self.histories[place][-1]) == position, "a session's position does not match its calls"

    def append(self, places, rng, last=False):
        given = self._chunk(places, rng, 0)
        results = self.server("append_last" if last else "append", **given)
        for i, place in enumerate(places):
            history, n = self.histories[place][-1], given["lengths"][i]
            if last and not n and not len(history):
                assert not results["logits"][i].any()
            elif last:
                history.logits.append((len(history) + n - 1, results["logits"][i][None]))
            else:
                assert not results["logits"][i, n:].any()
                history.logits.append((len(history), results["logits"][i, :n]))
            history.tokens.append(given["token_ids"][i, :n])
        self._check_positions(places, results)

    def append_last(self, places, rng):
        self.append(places, rng, last=True)

    def generate(self, places, rng):
        begun = all(len(self.histories[place][-1]) for place in places)
        given = self._chunk(places, rng, 0 if begun else 1)
        options = {
            "max_new_tokens": int(rng.integers(1, 6)),
            "temperature": float(rng.choice([0.0, 0.7, 1.5])),
            "top_k": int(rng.choice([0, 5])),
            "stop_tokens": [3, 4],
        }
        seeds = rng.integers(0, 2**31 - 1, len(places))
        results = self.server("session_generate", **given, **options, seed=seeds)
        for i, place in enumerate(places):
            history, n = self.histories[place][-1], given["lengths"][i]
            tokens = results["tokens"][i, : results["lengths"][i]]
            history.tokens.append(given["token_ids"][i, :n])
            history.choices.append((len(history), tokens, options, int(seeds[i])))
            history.tokens.append(tokens)
        self._check_positions(places, results)

    def reset(self, places, rng):
        results = self.server("reset", sessions=[self.numbers[p] for p in places])
        for place in places:
            self.histories[place].append(History())
        self._check_positions(places, results)

    def reopen(self, places, rng):
        old = [self.numbers[place] for place in places]
        self.server("close", sessions=old)
        try:
            self.server("append", sessions=old[:1], token_ids=[[1]], lengths=[1])
            raise AssertionError("a closed session accepted a call")
        except self.server.tf.errors.InvalidArgumentError as error:
            assert "No such session" in str(error)
        for place, number in zip(places, self.server("open", count=len(places))["sessions"], strict=True):
            assert int(number) not in old
            self.numbers[place] = int(number)
            self.histories[place].append(History())

    def check(self, lm):
        """The largest differences of the server's logits, relative to the session's largest logit and absolute, and the
        largest gap between the scores of a chosen token and of the best eligible one."""
        import keras_fam

        stream, relative, difference, loss = keras_fam.StreamingModel(lm, 1), 0.0, 0.0, 0.0
        for histories in self.histories:
            for history in histories:
                if not len(history):
                    continue
                stream.reset_state()
                expected = stream.predict(np.concatenate([NOTHING, *history.tokens])[None])[0]
                for first, logits in history.logits:
                    part = expected[first : first + len(logits)]
                    found = float(np.abs(part - logits).max(initial=0))
                    relative = max(relative, found / float(np.abs(expected).max()))
                    difference = max(difference, found)
                for first, tokens, options, seed in history.choices:
                    for i, token in enumerate(tokens):
                        scores, surely, perhaps = self._scores(expected[first + i - 1], options, seed, first + i)
                        assert perhaps[token], "a token outside the top k was chosen"
                        loss = max(loss, float(scores[surely].max(initial=-np.inf) - scores[token]))
        return relative, difference, loss

    def _scores(self, logits, options, seed, position):
        """`(scores, surely, perhaps)` of each token: the score by which it is chosen (its logit, plus noise if
        sampled), and whether it is among the top k for any, or for some, rounding error of the logits."""
        tf = self.server.tf
        everything = np.ones(len(logits), bool)
        if not options["temperature"]:
            return logits, everything, everything
        scores = logits / np.float32(options["temperature"])
        surely = perhaps = everything
        if options["top_k"]:
            ranked, margin = np.sort(scores), 1e-4
            surely = scores > ranked[-options["top_k"] - 1] + margin
            perhaps = scores > ranked[-options["top_k"]] - margin
        noise = tf.random.stateless_uniform([len(logits)], [seed, position], minval=1e-30, alg="philox")
        return scores - np.log(-np.log(noise.numpy())), surely, perhaps


def collide(server, threads, calls):
    """All threads append to one session: `(accepted, refused, difference from the stream of accepted calls)`."""
    number = server("open", count=1)["sessions"]
    kept, refused = [], []

    def work(thread):
        for _ in range(calls // threads):
            try:
                results = server("append", sessions=number, token_ids=[[thread]], lengths=[1])
                kept.append((int(results["positions"][0]), thread, results["logits"][0, 0]))
            except server.tf.errors.InvalidArgumentError as error:
                refused.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    kept.sort(key=lambda entry: entry[0])
    assert [position for position, _, _ in kept] == list(range(1, len(kept) + 1)), "a call was lost or counted twice"
    assert all("Another call changed" in str(error) for error in refused)
    expected = server("serving_default", token_ids=[[thread for _, thread, _ in kept]])["logits"][0]
    return len(kept), len(refused), float(np.abs(expected - np.stack([x for _, _, x in kept])).max())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=10_000)
    arguments = parser.parse_args(argv)
    import keras

    from examples.serving.small_model import VOCABULARY, small_model
    from keras_fam.export import export_serving

    lm = small_model()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(export_serving(lm, folder, sessions=arguments.sessions, admin_secret="stress"))
        stress = Stress(server, arguments.sessions, arguments.threads, arguments.calls, VOCABULARY)
        start = time.perf_counter()
        stress.run()
        seconds = time.perf_counter() - start
        assert sum(stress.counts.values()) == arguments.calls
        listed = server("list", count=10**6, secret="stress")["sessions"].tolist()
        assert sorted(stress.numbers) == listed, "a session was lost"
        server("close", sessions=stress.numbers[:1])
        kept, refused, mixed = collide(server, arguments.threads, 400)
    relative, difference, loss = stress.check(lm)
    histories = sum(map(len, stress.histories))
    tokens = sum(len(history) for session in stress.histories for history in session)
    warm = stress.memory[len(stress.memory) // 5]
    print(
        f"exported under {keras.backend.backend()}: {arguments.calls} calls {stress.counts} by {arguments.threads} "
        f"threads on {arguments.sessions} sessions ({histories} histories, {tokens} tokens) in {seconds:.0f} s\n"
        f"largest difference from private streams: logits {relative:.1e} of the largest ({difference:.1e} as they "
        f"are), score of a chosen token {loss:.1e}\n"
        f"resident memory: {warm:.0f} MiB after a fifth of the calls, {stress.memory[-1]:.0f} MiB at the end "
        f"({100 * (stress.memory[-1] / warm - 1):+.2f} %)\n"
        f"one session, {arguments.threads} threads: {kept} calls kept, {refused} refused, difference {mixed:.1e}"
    )
    if not max(relative, mixed) <= TOLERANCE or not loss <= 10 * TOLERANCE:
        raise SystemExit(f"A difference exceeds {TOLERANCE:.0e}.")


if __name__ == "__main__":
    main()
