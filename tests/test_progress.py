"""Long trainings: datasets that are followed, interrupted runs that resume, curricula, schedules of RSP."""

import keras
import numpy as np
import pytest
from keras import ops
from support import numpy

import keras_fam
from keras_fam.data import AssociativeRecall, DocumentRows, TaskBatches
from keras_fam.training import Curriculum, FollowDataset, SaveProgress

V, S, B, STEPS = 11, 4, 2, 5
DRAWN = np.random.default_rng(0)


class Interrupted(Exception):
    pass


class Losses(keras.callbacks.Callback):
    """Running losses by batch number since the start of training; raises after `stop` batches."""

    def __init__(self, dataset, stop=None):
        super().__init__()
        self.dataset, self.stop, self.seen = dataset, stop, {}

    def on_epoch_begin(self, epoch, logs=None):
        self.first = self.dataset.position

    def on_train_batch_end(self, batch, logs=None):
        self.seen[self.first + batch] = float(logs["loss"])
        if len(self.seen) == self.stop:
            raise Interrupted


def make_rows(**options):
    texts = [np.random.default_rng(i).integers(1, V, 40 + 7 * i) for i in range(5)]
    return DocumentRows(texts, B, 2 * S, **{"steps_per_epoch": STEPS, **options})


def make_lm(seed=0, **settings):
    keras.utils.set_random_seed(seed)
    backbone = keras_fam.TransformerFAMBackbone(
        V, 1, 8, 2, 16, block_size=S, memory_segments=1, fam_length=2, **settings
    )
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    return lm


def make_stream(seed=0, **settings):
    stream = keras_fam.StreamingModel(make_lm(seed, **settings), B)
    stream.compile(keras.optimizers.Adam(1e-2))
    return stream


def continued(seen, expected):
    """The losses of a run in parts are those of the run in one."""
    assert sorted(expected)[-len(seen) :] == sorted(seen)
    for number, loss in seen.items():
        assert abs(loss - expected[number]) <= 1e-6 * expected[number], (keras.backend.backend(), number)


def test_a_stream_resumes_at_any_batch(tmp_path):
    """Weights, optimizer, carried state, seeds of dropout and noise, running metrics and the place in the documents."""
    settings = {"dropout": 0.2, "fam_noise": 0.1}

    def grow(rows):
        return Curriculum(rows, (3 * S, None), attribute="longest", monitor="loss", threshold=100)

    rows = make_rows(longest=3 * S)
    whole = Losses(rows)
    make_stream(**settings).fit(rows, epochs=2, verbose=0, callbacks=[whole, grow(rows)])
    assert rows.position == 2 * STEPS and sorted(whole.seen) == list(range(2 * STEPS))
    path = tmp_path / "new" / "progress.safetensors"
    rows, stop = make_rows(longest=3 * S), int(DRAWN.integers(2, 2 * STEPS))
    stream, losses = make_stream(**settings), Losses(rows, stop)
    with pytest.raises(Interrupted):
        SaveProgress(path, stream, rows, every=2).fit(2, callbacks=[losses, grow(rows)], verbose=0)
    continued(losses.seen, {k: whole.seen[k] for k in range(stop)})
    rows, stream = make_rows(longest=3 * S), make_stream(seed=9, **settings)
    progress, losses = SaveProgress(path, stream, rows, every=2), Losses(rows)
    progress.fit(2, callbacks=[losses, grow(rows)], verbose=0)
    assert rows.longest is None
    assert stop - 2 <= min(losses.seen) <= stop
    continued(losses.seen, whole.seen)
    assert rows.position == 2 * STEPS and progress.fit(2) == []
    with pytest.raises(ValueError, match="Make both as they were"):
        other = make_stream(num_visible_memories=2)
        SaveProgress(path, other, make_rows()).restore()
    assert other.position.tolist() == [0, 0]


def test_a_model_resumes_with_its_schedule(tmp_path):
    """`keras.Model.fit` on a task; the memory that RSP passes on and its schedule go on as well."""
    passing = {"random_state_passing": keras_fam.Ramp(1.0, delay=3, ramp=4)}

    def parts(seed=0):
        task = AssociativeRecall(num_pairs=2, symbols=V - 4)
        lm, batches = make_lm(seed, **passing), TaskBatches(task, B, block_size=S, blocks=4, steps_per_epoch=STEPS)
        lm.compile(keras.optimizers.Adam(1e-2))
        return lm, batches

    lm, batches = parts()
    whole = Losses(batches)
    SaveProgress(tmp_path / "whole.safetensors", lm, batches).fit(2, callbacks=[whole], verbose=0)
    assert len(whole.seen) == 2 * STEPS and batches.position == 2 * STEPS
    assert float(numpy(lm.backbone.random_state_passing.current_rate)) == 1.0
    lm, batches = parts()
    path = tmp_path / "progress.safetensors"
    with pytest.raises(Interrupted):
        SaveProgress(path, lm, batches).fit(2, callbacks=[Losses(batches, STEPS + 2)], verbose=0)
    lm, batches = parts(seed=9)
    losses = Losses(batches)
    SaveProgress(path, lm, batches).fit(2, callbacks=[losses], verbose=0)
    continued(losses.seen, {k: whole.seen[k] for k in range(STEPS, 2 * STEPS)})


def test_fit_moves_the_place_on():
    """Two fits read on; evaluation, a failed fit and other epochs than the dataset's do not move it."""
    rows, stream = make_rows(steps_per_epoch=None), make_stream()
    stream.fit(rows, epochs=2, steps_per_epoch=2, verbose=0)
    assert rows.position == 4
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            seen.append(logs["outputs"].shape)

    stream.predict(rows, steps=2, callbacks=[Watch()])
    assert seen == [(B, 2 * S, V)] * 2 and rows.position == 4
    with pytest.raises(Interrupted):
        stream.fit(rows, steps_per_epoch=3, verbose=0, callbacks=[Losses(rows, stop=2)])
    assert rows.position == 4
    twin = make_rows(steps_per_epoch=None)
    twin.advance(4)
    np.testing.assert_array_equal(rows[0][1], twin[0][1])
    with pytest.raises(ValueError, match="leave it out of `fit`"):
        stream.fit(make_rows(), steps_per_epoch=3, verbose=0)
    with pytest.raises(ValueError, match="built and compiled"):
        SaveProgress("nowhere.safetensors", make_lm(), rows)


def test_curricula():
    """Stages by epochs and by a threshold, over rows in `fit` (one compiled step) and over growing batches."""
    rows, stream, seen = make_rows(longest=S), make_stream(), []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(rows.longest)

    stages = Curriculum(rows, (S, 4 * S, None), attribute="longest", epochs=[2, 1, 1])
    stream.fit(rows, epochs=5, verbose=0, callbacks=[stages, Watch()])
    assert seen == [S, S, 4 * S, None, None] and stages.stage == 2

    batches = TaskBatches(AssociativeRecall(num_pairs=2, symbols=4), B, block_size=8, blocks=2, steps_per_epoch=2)
    grow = Curriculum(batches, (2, 3, 5), monitor="accuracy", threshold=0.9, mode="max")
    found = []
    for epoch, accuracy in enumerate((0.5, 0.95, 0.2, 0.9, 1.0, 1.0)):
        grow.on_epoch_begin(epoch)
        found.append(batches[0][0].shape[1] // 8)
        grow.on_epoch_end(epoch, {"accuracy": accuracy})
    assert found == [2, 2, 3, 3, 5, 5]
    with pytest.raises(ValueError, match="name in the logs"):
        grow.on_epoch_end(6, {"loss": 1.0})
    for wrong in ({}, {"epochs": 1, "monitor": "loss", "threshold": 1}, {"monitor": "loss"}, {"epochs": [1]}):
        with pytest.raises(ValueError):
            Curriculum(batches, (2, 3, 5), **wrong)
    with pytest.raises(ValueError, match="'width'"):
        Curriculum(batches, (1, 2), attribute="width", epochs=1)


def test_growing_batches_in_fit():
    """T changes between the epochs of one `fit`: as a `PyDataset` on JAX and torch, as `tf.data` everywhere."""
    pytest.importorskip("tensorflow")
    lm = keras.Sequential([keras.layers.Embedding(8, 4), keras.layers.Dense(8)])
    lm.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    batches = TaskBatches(AssociativeRecall(num_pairs=2, symbols=4), B, block_size=8, blocks=2, steps_per_epoch=2)
    grow, shapes = Curriculum(batches, (2, 3), epochs=1), []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            shapes.append((batches.position, batches[0][0].shape[1]))

    data = batches.to_tf_dataset(fixed_length=False)
    lm.fit(data, epochs=2, verbose=0, callbacks=[grow, FollowDataset(batches), Watch()])
    assert shapes == [(0, 16), (2, 24)] and batches.position == 4


def test_ramp():
    ramp = keras_fam.Ramp(0.8, delay=3, ramp=4)
    rates = [float(numpy(ramp(ops.convert_to_tensor(i)))) for i in range(12)]
    np.testing.assert_allclose(rates, [0, 0, 0, 0.16, 0.32, 0.48, 0.64] + [0.8] * 5, rtol=1e-6)
    jump = keras_fam.Ramp(1.0, delay=2)
    assert [float(numpy(jump(ops.convert_to_tensor(i)))) for i in range(4)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="`delay`"):
        keras_fam.Ramp(0.5, delay=-1)


def test_passing_sets_in_with_the_schedule(tmp_path):
    """In compiled steps: the learned memory gets gradients until every row starts from the one that is passed on."""
    lm = make_lm(random_state_passing=keras_fam.Ramp(1.0, delay=2))
    lm.compile(keras.optimizers.SGD(1e-1))
    tokens = np.random.default_rng(0).integers(1, V, (B, 3 * S))
    moved = []
    for step in range(4):
        if step == 1:  # a loaded model counts on
            lm.save(tmp_path / "lm.keras")
            lm = keras.models.load_model(tmp_path / "lm.keras")
        before = numpy(lm.backbone.memory_prompt)
        lm.train_on_batch(tokens, np.roll(tokens, -1, axis=1))
        moved.append(bool(np.abs(numpy(lm.backbone.memory_prompt) - before).max() > 0))
    assert moved == [True, True, False, False]
    assert int(numpy(lm.backbone.random_state_passing.steps)) == 4
