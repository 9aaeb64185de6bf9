"""Threads over one model, and over one stream: every answer is the one given alone."""

import functools
import threading

import keras
import numpy as np
import support

import keras_fam

BACKEND = keras.backend.backend()
WAIT = 300  # seconds, for a thread that hangs


def in_threads(*works):
    """Runs functions at once, from a common start; their results, or the first exception."""
    results, errors, start = [None] * len(works), [], threading.Barrier(len(works))

    def run(i):
        try:
            start.wait(WAIT)
            results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), f"{BACKEND}: a thread hangs"
    if errors:
        raise errors[0]
    return results


def lively():
    """A small model whose greedy texts differ."""
    lm = support.tiny(tie_weights=False)
    rng = np.random.default_rng(3)
    for weight in lm.weights:
        weight.assign(rng.normal(size=weight.shape) * (0.8 if len(weight.shape) > 1 else 0.2))
    return lm


def test_four_threads_generate_with_one_model():
    """Programs are compiled and, on torch, traced while other threads run: the model has answered nothing before."""
    lm = lively()
    lm.compile(sampler="greedy")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, support.TINY_VOCABULARY, 3 + i % 4).tolist() for i in range(12)]

    def answer(i):
        return lm.generate([prompts[i]], max_length=10, stop_token_ids=None)[0]

    def work(shift):
        order = [(i + 3 * shift) % 12 for i in range(12)]
        return {i: answer(i) for i in order}

    together = in_threads(*[functools.partial(work, shift) for shift in range(4)])
    alone = {i: answer(i) for i in range(12)}
    assert len({tuple(text[6:]) for text in alone.values()}) > 4  # no constant text
    wrong = sum(found[i] != alone[i] for found in together for i in range(12))
    assert wrong == 0, f"{BACKEND}: {wrong} of 48 answers differ from those given alone"


def test_streams_of_two_threads_over_one_model():
    """Chunks of several lengths, tokens one by one, and seeded random tokens."""
    lm = lively()
    tokens = np.random.default_rng(1).integers(0, support.TINY_VOCABULARY, (2, 2, 24)).astype("int32")

    def work(i):
        stream, outputs = keras_fam.StreamingModel(lm, 2), []
        for first, last in ((0, 3), (3, 4), (4, 8), (8, 15), (15, 24)):
            outputs.append(stream.predict(tokens[i][:, first:last]))
        steps = [t.tolist() for t in stream.generate_stream(max_new_tokens=8)]
        drawn = stream.generate(max_new_tokens=8, sampler="top_k", seed=7 + i)
        stream.reset_state([1])
        outputs.append(stream.predict(tokens[i][:, :2]))
        return outputs, steps, drawn, stream.position.tolist()

    together = in_threads(lambda: work(0), lambda: work(1))
    for i, found in enumerate(together):
        alone = work(i)
        assert found[1:] == alone[1:], BACKEND
        for a, b in zip(found[0], alone[0], strict=True):
            support.close(a, b, support.SPLIT)


def test_two_threads_take_turns_with_one_stream():
    lm = lively()
    stream, chunk = keras_fam.StreamingModel(lm, 1), np.array([[3, 1, 4]])

    def work():
        for _ in range(10):
            stream.predict(chunk)

    in_threads(work, work)
    assert stream.position.tolist() == [60], BACKEND
    alone = keras_fam.StreamingModel(lm, 1)
    for _ in range(20):
        alone.predict(chunk)
    support.states_close(stream.state, alone.state, support.SPLIT)
    support.close(stream.next_logits, alone.next_logits, support.SPLIT)

    def generate():
        return [stream.generate(max_new_tokens=3)[0] for _ in range(3)]

    first, second = in_threads(generate, generate)
    parts = alone.generate(max_new_tokens=18)[0]
    parts = [tuple(parts[i : i + 3]) for i in range(0, 18, 3)]
    assert sorted(map(tuple, first + second)) == sorted(parts), BACKEND


def test_a_stream_is_not_read_within_its_own_training():
    """The training holds its state until it ends; another stream goes on from there."""
    lm = lively()
    stream, seen = keras_fam.StreamingModel(lm, 1), []
    x = np.array([[1, 2, 3, 4, 5, 6]])

    class Reader(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            for use in (
                lambda: stream.predict(x),
                lambda: stream.generate(max_new_tokens=1),
                lambda: stream.generate_stream(max_new_tokens=1),
                stream.reset_state,
                lambda: stream.save_state("unused"),
                lambda: stream.set_state(stream.state),
            ):
                try:
                    use()
                except RuntimeError as error:
                    seen.append("set_state(stream.state)" in str(error))
            other = keras_fam.StreamingModel(lm, 1)
            other.set_state(stream.state)
            seen.append(other.position.tolist() == [6])

    stream.compile("sgd", jit_compile=False)
    stream.fit(x, x, callbacks=[Reader()], verbose=0)
    assert seen == [True] * 7, BACKEND
    assert stream.position.tolist() == [6]
