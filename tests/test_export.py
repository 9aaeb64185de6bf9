"""Export for TF Serving: one export per backend, loaded again; expected values come from whole sequences in Keras."""

import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import support

import keras_fam
from keras_fam.export import export_serving

V, ROWS, TOTAL, PLACES = 31, 8, 48, 8
BACKBONE = {**support.SMALL, "vocabulary_size": V, "num_layers": 2, "hidden_dim": support.HIDDEN_DIM}
CHUNKS = (1, 2, 5, 1, 4, 9, 26)  # of TOTAL
STATELESS = {"serving_default", "padded", "init_state", "step", "generate"}
SESSIONS = {"open", "list", "append", "append_last", "session_generate", "reset", "close"}
OPTIONS = {"max_new_tokens": 6, "temperature": 0.0, "top_k": 0, "stop_tokens": [-1]}


def make_model(**settings):
    backbone = keras_fam.TransformerFAMBackbone(**{**BACKBONE, **settings})
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    rng = np.random.default_rng(0)
    for variable in lm.weights:
        variable.assign(rng.normal(size=variable.shape) * 0.5)
    return lm


class Served:
    """A loaded export: `served(signature, **inputs)` from and to NumPy."""

    def __init__(self, folder):
        import tensorflow as tf

        self.tf, self.signatures = tf, tf.saved_model.load(str(folder)).signatures

    def __call__(self, signature, **inputs):
        function = self.signatures[signature]
        specs = function.structured_input_signature[1]
        inputs = {name: self.tf.convert_to_tensor(x, specs[name].dtype) for name, x in inputs.items()}
        return {name: x.numpy() for name, x in function(**inputs).items()}

    def refuses(self, message, signature, **inputs):
        with pytest.raises(self.tf.errors.InvalidArgumentError, match=message):
            self(signature, **inputs)

    def append(self, sessions, tokens, signature="append", lengths=None):
        lengths = [tokens.shape[1]] * len(sessions) if lengths is None else lengths
        return self(signature, sessions=sessions, token_ids=tokens, lengths=lengths)


@pytest.fixture(scope="module")
def lm():
    return make_model()


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    return export_serving(lm, tmp_path_factory.mktemp("served"), sessions=PLACES, blocks_per_step=2)


@pytest.fixture(scope="module")
def served(folder):
    return Served(folder)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, V, (ROWS, TOTAL)).astype("int32")


@pytest.fixture(scope="module")
def whole(lm, tokens):
    """Logits of the whole sequences by Keras, `[ROWS, TOTAL, V]`: those of any chunks of them."""
    return lm.predict(tokens, verbose=0)


@pytest.fixture
def sessions(served):
    """All places of the table, open and anew; free again afterwards."""
    opened = served("open", count=PLACES)["sessions"]
    yield opened
    still = served("list", count=PLACES)["sessions"]
    served("close", sessions=still)


def state_of(results):
    return {name: x for name, x in results.items() if name.startswith("state_")}


def test_signatures_are_flat_and_named(served, folder):
    assert set(served.signatures) == STATELESS | SESSIONS
    assert (folder.name, (folder / "saved_model.pb").exists()) == ("1", True)
    state = {name for name in served.signatures["init_state"].structured_outputs}
    assert {"state_position_offset", "state_layers_1_value", "state_layers_0_fam", "state_logits"} <= state
    assert state == set(state_of(served.signatures["step"].structured_outputs))
    assert state <= set(served.signatures["generate"].structured_input_signature[1])


def test_whole_sequences_of_any_shape(served, tokens, whole):
    for rows, total in ((ROWS, TOTAL), (1, 1), (3, 7), (2, 4)):
        logits = served("serving_default", token_ids=tokens[:rows, :total])["logits"]
        support.close(logits, whole[:rows, :total], 1e-5)


def test_padding_does_not_exist(served, tokens, whole):
    mask = np.random.default_rng(2).random((ROWS, TOTAL)) < 0.6
    mask[0] = False
    ids = np.full((ROWS, TOTAL), -7, "int32")  # padding may hold anything
    expected = np.zeros_like(whole)
    for row in range(ROWS):
        count = mask[row].sum()
        ids[row, mask[row]] = tokens[row, :count]
        expected[row, mask[row]] = whole[row, :count]
    logits = served("padded", token_ids=ids, padding_mask=mask)["logits"]
    assert np.isfinite(logits).all() and not logits[~mask].any()
    support.close(logits, expected, 1e-5)


def test_steps_carry_the_state(served, tokens, whole):
    state = served("init_state", batch_size=ROWS)
    first, found = 0, []
    for size in CHUNKS:
        chunk = tokens[:, first : first + size]
        results = served("step", token_ids=chunk, lengths=[size] * ROWS, **state)
        state, first = state_of(results), first + size
        found.append(results["logits"])
    support.close(np.concatenate(found, axis=1), whole, 1e-5)
    support.close(state["state_logits"], whole[:, -1], 1e-5)


def test_steps_of_rows_with_lengths_of_their_own(served, tokens, whole):
    rng = np.random.default_rng(3)
    state, place = served("init_state", batch_size=ROWS), np.zeros(ROWS, int)
    for size in (5, 1, 9, 3):
        lengths = rng.integers(0, size + 1, ROWS)
        chunk = np.full((ROWS, size), 10**6, "int32")
        for row, n in enumerate(lengths):
            chunk[row, :n] = tokens[row, place[row] : place[row] + n]
        results = served("step", token_ids=chunk, lengths=lengths, **state)
        state = state_of(results)
        for row, n in enumerate(lengths):
            support.close(results["logits"][row, :n], whole[row, place[row] : place[row] + n], 1e-5)
            assert not results["logits"][row, n:].any()
        place += lengths
    assert (state["state_position_block_index"] * 4 + state["state_position_offset"] == place).all()


def test_checks_of_stateless_calls(served, tokens):
    state = served("init_state", batch_size=2)
    two = {"token_ids": tokens[:2, :3], "lengths": [3, 3], **state}
    served.refuses("T ≥ 1", "serving_default", token_ids=np.zeros((2, 0)))
    served.refuses("numbers from 0 to 30", "serving_default", token_ids=[[0, V]])
    served.refuses("numbers from 0 to 30", "step", **{**two, "token_ids": [[0, 1, -1]] * 2})
    served.refuses("from 0 to T", "step", **{**two, "lengths": [4, 0]})
    served.refuses("one entry per row", "step", **{**two, "lengths": [1]})
    served.refuses("one row per row", "step", **{**two, **served("init_state", batch_size=1)})
    served.refuses("shape of token_ids", "padded", token_ids=[[1, 2]], padding_mask=[[True]])
    served.refuses("at least 0", "init_state", batch_size=-1)
    given = {**two, **OPTIONS, "seed": [0, 0]}
    served.refuses("temperature", "generate", **{**given, "temperature": float("nan")})
    served.refuses("top_k", "generate", **{**given, "top_k": -1})
    served.refuses("max_new_tokens", "generate", **{**given, "max_new_tokens": -1})
    served.refuses("seed has one entry", "generate", **{**given, "seed": [0]})
    served.refuses("needs a prompt", "generate", **{**given, "lengths": [3, 0]})


def test_greedy_generation_takes_the_best_token(served, lm, tokens, sessions):
    lengths = np.array([1, 2, 5, 9, 13, 20, 3, 8])  # 20 tokens take three steps of two blocks
    prompt = tokens[:, :20]
    state = served("init_state", batch_size=ROWS)
    given = {"token_ids": prompt, "lengths": lengths, **OPTIONS, "seed": np.zeros(ROWS)}
    results = served("generate", **given, **state)
    assert (results["lengths"] == 6).all()
    text = np.zeros((ROWS, TOTAL), "int32")
    for row, n in enumerate(lengths):
        text[row, : n + 6] = np.concatenate([prompt[row, :n], results["tokens"][row]])
    logits = lm.predict(text, verbose=0)
    for row, n in enumerate(lengths):
        before = logits[row, n - 1 : n + 5]
        chosen = np.take_along_axis(before, results["tokens"][row][:, None], axis=1)[:, 0]
        np.testing.assert_allclose(chosen, before.max(axis=1), atol=1e-5)
        support.close(results["state_logits"][row], logits[row, n + 5], 1e-5)
    by_session = served("session_generate", sessions=sessions, **given)
    np.testing.assert_array_equal(by_session["tokens"], results["tokens"])
    np.testing.assert_array_equal(by_session["positions"], lengths + 6)


def test_generation_goes_on_where_it_stood(served, tokens, sessions):
    given = {"token_ids": tokens[:, :5], "lengths": [5] * ROWS, **OPTIONS, "temperature": 1.3, "top_k": 20}
    given["seed"] = np.arange(ROWS) // 2
    state = served("init_state", batch_size=ROWS)
    at_once = served("generate", **{**given, "max_new_tokens": 9}, **state)
    assert (at_once["tokens"][0] != at_once["tokens"][2]).any()
    first = served("generate", **{**given, "max_new_tokens": 4}, **state)
    rest = {**given, "lengths": np.zeros(ROWS), "max_new_tokens": 5}
    second = served("generate", **rest, **state_of(first))
    joined = np.concatenate([first["tokens"], second["tokens"]], axis=1)
    np.testing.assert_array_equal(joined, at_once["tokens"])
    alone = served(  # another batch, another place in it, the same draws
        "session_generate",
        sessions=sessions[:1],
        **{**given, "token_ids": tokens[3:4, :5], "lengths": [5], "seed": given["seed"][3:4], "max_new_tokens": 9},
    )
    np.testing.assert_array_equal(alone["tokens"][0], at_once["tokens"][3])


def test_draws_follow_the_distribution(served, tokens, whole):
    draws = 3000
    state = {k: np.repeat(v, draws, axis=0) for k, v in served("init_state", batch_size=1).items()}
    given = {"token_ids": np.repeat(tokens[:1, :3], draws, axis=0), "lengths": [3] * draws, "seed": np.arange(draws)}
    given |= {**OPTIONS, "max_new_tokens": 1, "temperature": 0.8}
    for top_k in (0, 4):
        scores = whole[0, 2].astype("float64") / 0.8
        if top_k:
            scores[scores < np.sort(scores)[-top_k]] = -np.inf
        expected = np.exp(scores - scores.max())
        expected /= expected.sum()
        drawn = served("generate", **{**given, "top_k": top_k}, **state)["tokens"][:, 0]
        seen = np.bincount(drawn, minlength=V) / draws
        assert not seen[expected == 0].any()
        assert np.abs(seen - expected).max() < 5 * np.sqrt(0.25 / draws)  # five standard deviations


def test_rows_end_at_stop_tokens(served, tokens, whole, sessions):
    given = {"sessions": sessions, "token_ids": tokens[:, :5], "lengths": [5] * ROWS, "seed": np.zeros(ROWS)}
    free = served("session_generate", **given, **{**OPTIONS, "max_new_tokens": 12})["tokens"]
    served("reset", sessions=sessions)
    stops = [free[0, 3], free[1, 0]]
    results = served("session_generate", **given, **{**OPTIONS, "max_new_tokens": 12, "stop_tokens": stops})
    assert len(set(results["lengths"])) > 1
    for row in range(ROWS):
        ends = np.flatnonzero(np.isin(free[row], stops))
        count = ends[0] + 1 if len(ends) else 12
        assert results["lengths"][row] == count
        np.testing.assert_array_equal(results["tokens"][row], np.where(np.arange(12) < count, free[row], 0))
    np.testing.assert_array_equal(results["positions"], 5 + results["lengths"])


def test_sessions_remember(served, tokens, whole, sessions):
    order, first = np.random.default_rng(4).permutation(ROWS), 0
    for size in CHUNKS:
        for rows in (order[:3], order[3:]):
            chunk = tokens[rows, first : first + size]
            signature = "append_last" if size == 9 or rows[0] == order[0] else "append"
            results = served.append(sessions[rows], chunk, signature)
            expected = whole[rows, first : first + size]
            support.close(results["logits"], expected[:, -1] if signature == "append_last" else expected, 1e-5)
            assert (results["positions"] == first + size).all()
        first += size
    served("reset", sessions=sessions[2:3])
    support.close(served.append(sessions[2:3], tokens[2:3, :6])["logits"], whole[2:3, :6], 1e-5)


def test_calls_that_fail_change_nothing(served, tokens, whole, sessions):
    served.append(sessions, tokens[:, :3])
    own, chunk, far = sessions[:2], tokens[:2, 3:5], sessions[:1] + 100 * PLACES
    for numbers in (far, [-1], [-1 - sessions[0]]):
        for signature in ("reset", "close"):
            served.refuses("No such session", signature, sessions=numbers)
        served.refuses("No such session", "append", sessions=numbers, token_ids=chunk[:1], lengths=[2])
    served.refuses("No such session", "append", sessions=[sessions[0], far[0]], token_ids=chunk, lengths=[2, 2])
    for signature in ("append", "append_last"):
        served.refuses("each session once", signature, sessions=[own[0]] * 2, token_ids=chunk, lengths=[2, 2])
        served.refuses("from 0 to T", signature, sessions=own, token_ids=chunk, lengths=[2, 3])
        served.refuses("one row per session", signature, sessions=own[:1], token_ids=chunk, lengths=[2, 2])
        served.refuses("numbers from 0", signature, sessions=own, token_ids=chunk + V, lengths=[2, 2])
    served.refuses("each session once", "reset", sessions=[own[0]] * 2)
    served.refuses("each session once", "close", sessions=[own[0]] * 2)
    options = {**OPTIONS, "seed": [0, 0], "top_k": -1}
    served.refuses("top_k", "session_generate", sessions=own, token_ids=chunk, lengths=[2, 2], **options)
    served.refuses("close some first. Wanted and free:] .1. .0.", "open", count=1)
    served.refuses("at least 0", "open", count=-1)
    np.testing.assert_array_equal(np.sort(sessions), served("list", count=99)["sessions"])
    results = served.append(sessions, tokens[:, 3:5])
    support.close(results["logits"], whole[:, 3:5], 1e-5)


def test_numbers_are_not_used_twice(served, tokens, whole, sessions):
    old = sessions[3:5]
    served.append(old, tokens[:2, :5])
    assert served("close", sessions=old)["free"] == 2
    new = served("open", count=1)["sessions"]
    assert not set(new) & set(sessions)
    served.refuses("No such session", "append", sessions=old[:1], token_ids=tokens[:1, :1], lengths=[1])
    support.close(served.append(new, tokens[:1, :6])["logits"], whole[:1, :6], 1e-5)
    assert served("close", sessions=new)["free"] == 2


def test_calls_of_no_rows(served, tokens, sessions):
    none = np.zeros(0)
    assert served.append(none, tokens[:0, :3])["logits"].shape == (0, 3, V)
    assert served("open", count=0)["sessions"].shape == (0,)
    assert served("close", sessions=none)["free"] == 0
    assert served("serving_default", token_ids=tokens[:0, :3])["logits"].shape == (0, 3, V)
    state = served("init_state", batch_size=0)
    given = {**OPTIONS, "seed": none, "token_ids": tokens[:0, :3], "lengths": none}
    assert served("generate", **given, **state)["tokens"].shape == (0, 6)


def run_threads(work, count):
    """Runs `work(thread)` in threads and raises what any of them raised."""
    errors = []

    def guarded(i):
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_sessions_do_not_mix_between_threads(served, tokens, whole, sessions):
    idle, guard, place, calls = list(range(ROWS)), threading.Lock(), np.zeros(ROWS, int), []

    def work(thread):
        rng = np.random.default_rng(thread)
        for _ in range(25):
            with guard:
                rng.shuffle(idle)
                rows = [idle.pop() for _ in range(rng.integers(1, 3))]
            size = int(rng.integers(1, 8))
            if any(place[rows] + size > TOTAL):
                served("reset", sessions=sessions[rows])
                place[rows] = 0
            chunk = np.stack([tokens[row, place[row] : place[row] + size] for row in rows])
            expected = np.stack([whole[row, place[row] : place[row] + size] for row in rows])
            results = served.append(sessions[rows], chunk)
            support.close(results["logits"], expected, 1e-5)
            place[rows] += size
            assert (results["positions"] == place[rows]).all()
            calls.append(rows)
            with guard:
                idle.extend(rows)

    run_threads(work, 4)
    assert len(calls) == 100


def test_one_session_in_many_threads_is_one_stream(served, tokens, whole, sessions):
    kept, refused = [], []

    def work(thread):
        for _ in range(20):
            token = np.full((1, 1), thread, "int32")
            try:
                results = served.append(sessions[:1], token)
                kept.append((int(results["positions"][0]), thread, results["logits"][0, 0]))
            except served.tf.errors.InvalidArgumentError as error:
                assert "Another call changed" in str(error)
                refused.append(thread)

    run_threads(work, 4)
    kept.sort(key=lambda entry: entry[0])
    assert len(kept) + len(refused) == 80
    assert [position for position, _, _ in kept] == list(range(1, len(kept) + 1))
    text = np.array([[thread for _, thread, _ in kept]], "int32")
    logits = served("serving_default", token_ids=text)["logits"][0]
    support.close(np.stack([found for _, _, found in kept]), logits, 1e-5)


def test_a_cancelled_call_changes_nothing_and_holds_nothing(served, tokens, whole, sessions):
    cancellation = pytest.importorskip("tensorflow.python.eager.cancellation")
    tf = served.tf
    served.append(sessions[:1], tokens[:1, :5])
    given = {**OPTIONS, "sessions": sessions[:1], "token_ids": tokens[:1, :1], "lengths": [1], "seed": [0]}
    given["max_new_tokens"] = 10**8
    function = served.signatures["session_generate"]
    specs = function.structured_input_signature[1]
    given = {name: tf.convert_to_tensor(x, specs[name].dtype) for name, x in given.items()}
    manager, failed = cancellation.CancellationManager(), []

    def work(thread):
        with pytest.raises(tf.errors.CancelledError), cancellation.CancellationManagerContext(manager):
            function(**given)
        failed.append(thread)

    thread = threading.Thread(target=work, args=(0,))
    thread.start()
    time.sleep(0.3)
    support.close(served.append(sessions[1:2], tokens[1:2, :5])["logits"], whole[1:2, :5], 1e-5)  # goes on beside it
    manager.start_cancel()
    thread.join()
    assert failed
    results = served.append(sessions[:1], tokens[:1, 5:9])
    assert results["positions"][0] == 9
    support.close(results["logits"], whole[:1, 5:9], 1e-5)


def test_sessions_as_the_server_runs_them(folder, tokens, whole):
    """TF Serving and the C API run the export in a session, whose locks and functions are not those of eager calls."""
    import tensorflow as tf

    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        signatures = tf.compat.v1.saved_model.load(session, ["serve"], str(folder)).signature_def

    def call(name, **inputs):
        signature = signatures[name]
        outputs = {key: info.name for key, info in signature.outputs.items()}
        return session.run(outputs, {signature.inputs[key].name: x for key, x in inputs.items()})

    sessions = call("open", count=4)["sessions"]

    def work(thread):
        first = 0
        for size in CHUNKS:
            with pytest.raises(tf.errors.InvalidArgumentError, match="No such session"):
                call("append", sessions=[99], token_ids=[[0]], lengths=[1])
            chunk = tokens[thread : thread + 1, first : first + size]
            results = call("append", sessions=sessions[thread : thread + 1], token_ids=chunk, lengths=[size])
            support.close(results["logits"], whole[thread : thread + 1, first : first + size], 1e-5)
            first += size

    run_threads(work, 4)
    assert call("close", sessions=sessions)["free"] == PLACES
    session.close()


FRESH = """
import sys
sys.modules["keras"] = sys.modules["keras_fam"] = None  # an import of either fails
import numpy as np
import tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
given = np.load(sys.argv[2])
logits = signatures["serving_default"](token_ids=tf.constant(given["tokens"]))["logits"].numpy()
difference = np.abs(logits - given["whole"]).max() / np.abs(given["whole"]).max()
assert difference <= 1e-5, difference
session = signatures["open"](count=tf.constant(1))["sessions"]
for i in range(0, 48, 16):
    chunk = tf.constant(given["tokens"][:1, i : i + 16])
    logits = signatures["append"](sessions=session, token_ids=chunk, lengths=tf.constant([16]))["logits"].numpy()
    assert np.abs(logits - given["whole"][:1, i : i + 16]).max() <= 1e-5 * np.abs(given["whole"]).max()
print("same")
"""


def test_a_fresh_process_without_keras(folder, tokens, whole, tmp_path):
    np.savez(tmp_path / "given.npz", tokens=tokens, whole=whole)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "given.npz")], capture_output=True, text=True
    )
    assert done.stdout == "same\n", done.stderr[-2000:]


def test_warmup_requests(served, folder):
    """Each can be run any number of times, in any order, and leaves the table as it is."""
    logs = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    tf, seen = served.tf, []
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        request = logs.PredictionLog.FromString(record).predict_log.request
        inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        for name, spec in served.signatures[request.model_spec.signature_name].structured_input_signature[1].items():
            assert inputs[name].dtype == spec.dtype.as_numpy_dtype
        served(request.model_spec.signature_name, **inputs)
        seen.append(request.model_spec.signature_name)
    assert set(seen) == STATELESS | SESSIONS
    assert not len(served("list", count=PLACES)["sessions"])


def test_what_does_not_fit_is_refused(lm, folder, monkeypatch):
    base = folder.parent
    with pytest.raises(ValueError, match="exists already"):
        export_serving(lm, base)
    with pytest.raises(ValueError, match="received Dense"):
        export_serving(keras.layers.Dense(3), base, version=2)
    for name in ("sessions", "version", "blocks_per_step"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=name):
                export_serving(lm, base, **{"version": 2, name: value})
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r"keras-fam\[tensorflow\]"):
        export_serving(lm, base, version=2)
    assert [path.name for path in base.iterdir()] == ["1"]


def test_a_version_appears_whole_or_not_at_all(tmp_path):
    from keras_fam.export.saved_model.folder import check_version
    from keras_fam.utils.atomic import replace_folder

    folder = check_version(tmp_path, 3, overwrite=False)
    with pytest.raises(RuntimeError), replace_folder(folder) as new:
        (new / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with replace_folder(folder) as new:
            (new / "whole").write_text(text)
            numbers = [path.name for path in tmp_path.iterdir() if path.name.isdigit()]
            assert numbers == (["3"] if text == "second" else [])
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    assert (folder / "whole").read_text() == "second"


def test_a_failing_second_process_says_why(lm, tmp_path, monkeypatch):
    import keras_fam.export as export

    monkeypatch.setattr(sys, "executable", sys.executable + "-missing")
    with pytest.raises(OSError):
        export._export_elsewhere(lm, tmp_path, {})
    script = tmp_path / "fails.sh"
    script.write_text('#!/bin/sh\necho "$KERAS_BACKEND cannot: $*" >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RuntimeError, match="tensorflow cannot: -m"):
        export._export_elsewhere(lm, tmp_path, {})


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the export itself runs on TensorFlow")
def test_words_keep_every_bit():
    import tensorflow as tf

    from keras_fam.export.saved_model.float32_packing import PackedTensor

    rng = np.random.default_rng(0)
    for dtype in ("float32", "int32", "bool", "float16", "bfloat16", "float64"):
        for shape in ((), (3,), (2, 3), (5, 1)):
            x = tf.cast(rng.normal(size=(4, *shape)) * 100, dtype)
            words = PackedTensor(shape, dtype)
            encoded = tf.function(words.encode)(x)
            assert encoded.shape == (4, words.count) and encoded.dtype == tf.float32
            decoded = words.decode(encoded)
            assert decoded.dtype == x.dtype and bool(tf.reduce_all(decoded == x)), (dtype, shape)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the export itself runs on TensorFlow")
def test_backbones_and_half_precision(tmp_path, tokens):
    model = make_model(dtype="mixed_bfloat16", num_layers=1).backbone
    served = Served(export_serving(model, tmp_path, sessions=2))
    assert set(served.signatures) == (STATELESS | SESSIONS) - {"generate", "append_last", "session_generate"}
    expected = np.asarray(model(tokens[:2, :20])).astype("float32")
    found = served("serving_default", token_ids=tokens[:2, :20])["hidden"]
    assert found.dtype == np.float32
    support.close(found, expected, 5e-2)  # a bfloat16 has 8 bits, and compiled graphs round in other places
    sessions = served("open", count=2)["sessions"]
    parts = [served.append(sessions, tokens[:2, i : i + 5])["hidden"] for i in range(0, 20, 5)]
    support.close(np.concatenate(parts, axis=1), expected, 5e-2)
