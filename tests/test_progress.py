"""Long trainings: datasets that are followed, interrupted runs that resume, curricula, schedules of RSP."""

import shutil

import keras
import numpy as np
import pytest
from keras import ops
from support import close, numpy

import keras_fam
from keras_fam.data import DocumentRows, TaskBatches
from keras_fam.tasks import AssociativeRecall
from keras_fam.training import Curriculum, DatasetPosition, SaveProgress
from keras_fam.training.batches import chunks_of

V, S, B, STEPS = 11, 4, 2, 5
QUICK = {"jit_compile": False} if keras.backend.backend() == "tensorflow" else {}  # XLA takes longer to compile a step


class Losses(keras.callbacks.Callback):
    """Running losses by batch number since the start of training.

    At batch `stop`, what a killed process would leave of `path` is copied beside it.
    """

    def __init__(self, dataset, path=None, stop=None):
        super().__init__()
        self.dataset, self.path, self.stop, self.seen = dataset, path, stop, {}

    def on_epoch_begin(self, epoch, logs=None):
        self.first = self.dataset.position

    def on_train_batch_end(self, batch, logs=None):
        self.seen[self.first + batch] = float(logs["loss"])
        if self.first + batch == self.stop:
            shutil.copy(self.path, f"{self.path}.broken")


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


def make_stream(seed=0, optimizer=None, **settings):
    stream = keras_fam.StreamingModel(make_lm(seed, **settings), B)
    stream.compile(optimizer or keras.optimizers.Adam(1e-2), **QUICK)
    return stream


@pytest.fixture(scope="module")
def stream():
    """Shared, since compiling a step takes long."""
    return make_stream()


def continued(seen, expected, first):
    """The losses of a resumed run are those of the run in one, from batch `first` on."""
    assert sorted(seen) == list(range(first, 2 * STEPS))
    for number, loss in seen.items():
        assert abs(loss - expected[number]) <= 1e-6 * expected[number], (keras.backend.backend(), number)


def test_a_stream_resumes_at_any_batch(tmp_path):
    """Weights and their averages, optimizer, carried state, seeds of dropout and noise, running metrics, the place in
    the documents, and the stage of a curriculum."""
    settings = {
        "dropout": 0.2,
        "memory_update": keras_fam.HardGate(noise=0.1),
        "fam_query": "anchored",
        "fam_gate": 0.0,
    }
    path = tmp_path / "new" / "progress.safetensors"

    def run(path, seed, stop=None):
        rows, optimizer = make_rows(longest=3 * S), keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9)
        stream = make_stream(seed, optimizer, **settings)
        grow = Curriculum(rows, (3 * S, None), attribute="longest", monitor="loss", threshold=100)
        progress, losses = SaveProgress(path, stream, rows, every=2), Losses(rows, path, stop)
        progress.fit(2, callbacks=[losses, grow], verbose=0)
        assert rows.position == 2 * STEPS and rows.longest is None
        return losses.seen, progress, stream

    expected, progress, stream = run(path, 0, stop=7)  # saved before batches 2, 4, 5, 7 and 9
    assert sorted(expected) == list(range(2 * STEPS)) and progress.fit(2) == []
    found, _, other = run(f"{path}.broken", 9)
    continued(found, expected, 7)
    for one, two in zip(keras.tree.flatten(stream.state), keras.tree.flatten(other.state), strict=True):
        close(one, numpy(two), 1e-5)
    averages = stream._trainer.optimizer._model_variables_moving_average
    for one, two, average in zip(
        stream.model.trainable_variables, other.model.trainable_variables, averages, strict=True
    ):
        close(two, numpy(one), 1e-5)
        np.testing.assert_array_equal(numpy(one), numpy(average))  # as Keras leaves them
    third = make_stream(9, keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9), **settings)
    assert SaveProgress(path, third, make_rows(longest=3 * S)).fit(2) == []  # complete, so the averages again
    for one, two in zip(stream.model.trainable_variables, third.model.trainable_variables, strict=True):
        np.testing.assert_array_equal(numpy(two), numpy(one))
    with pytest.raises(ValueError, match="Make both as they were"):
        SaveProgress(path, make_stream(num_visible_memories=2), make_rows()).restore()


def test_a_model_resumes_with_its_schedule(tmp_path):
    """`keras.Model.fit` on a task, from within the first epoch. Also restored: the memory that RSP passes on and its
    schedule, and the loss scale, accumulated gradients and averages of the optimizer."""
    path = tmp_path / "progress.safetensors"

    def run(path, seed, stop=None):
        lm = make_lm(seed, random_state_passing=keras_fam.training.Ramp(1.0, delay=3, ramp=4))
        optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2, use_ema=True, ema_momentum=0.9)
        lm.compile(keras.optimizers.LossScaleOptimizer(optimizer, dynamic_growth_steps=3), **QUICK)
        task = AssociativeRecall(num_pairs=2, symbols=V - 4)
        batches = TaskBatches(task, B, block_size=S, blocks=4, steps_per_epoch=STEPS)
        losses = Losses(batches, path, stop)
        SaveProgress(path, lm, batches, every=2).fit(2, callbacks=[losses], verbose=0)
        passing = lm.backbone.random_state_passing
        assert int(numpy(passing.steps)) == 2 * STEPS and float(numpy(passing.current_rate)) == 1.0
        return losses.seen, lm

    expected, lm = run(path, 0, stop=3)
    found, other = run(f"{path}.broken", 9)
    continued(found, expected, 4)
    for one, two in zip(lm.trainable_variables, other.trainable_variables, strict=True):
        close(two, numpy(one), 1e-5)


def test_fit_moves_the_place_on(stream):
    """Two fits read on; evaluation, a failed fit and other epochs than the dataset's do not move it."""
    rows, twin = make_rows(steps_per_epoch=None), make_rows(steps_per_epoch=None)
    stream.fit(rows, epochs=2, steps_per_epoch=2, verbose=0)
    assert rows.position == 4
    assert len(list(chunks_of(rows, 3))) == 3 and len(list(chunks_of(make_rows()))) == STEPS
    stream.evaluate(rows, steps=2, verbose=0)

    def fail(batch, logs=None):
        raise KeyError

    with pytest.raises(KeyError):
        fails = keras.callbacks.LambdaCallback(on_train_batch_end=fail)
        stream.fit(rows, steps_per_epoch=3, verbose=0, callbacks=[fails])
    assert rows.position == 4
    twin.advance(4)
    np.testing.assert_array_equal(rows[0][1], twin[0][1])
    with pytest.raises(ValueError, match="leave it out of `fit`"):
        stream.fit(make_rows(), steps_per_epoch=3, verbose=0)
    with pytest.raises(ValueError, match="built and compiled"):
        SaveProgress("nowhere.safetensors", make_lm(), rows)


def test_no_epoch_of_padding(stream):
    """A dataset that ends says so before training, and again when it is at its end."""
    rows = make_rows(steps_per_epoch=None, passes=1)
    before = stream.model.get_weights()
    with pytest.raises(ValueError, match=rf"data for {len(rows)} more batches.*Received: 3 epochs"):
        stream.fit(rows, epochs=3, verbose=0)
    with pytest.raises(ValueError, match="Received: 2 epochs"):
        SaveProgress("nowhere.safetensors", stream, rows).fit(2, verbose=0)
    for value, expected in zip(stream.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert rows.position == 0
    stream.fit(rows, verbose=0)
    assert rows.position == len(rows)
    for method in (stream.fit, stream.evaluate):
        with pytest.raises(ValueError, match=r"All documents were read|Received: 1 epochs"):
            method(rows, verbose=0)


def test_curricula(stream):
    """Stages by epochs and by a threshold, over rows in `fit` (one compiled step) and over growing batches."""
    rows, seen = make_rows(longest=S), []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(rows.longest)

    stages = Curriculum(rows, (S, 4 * S, None), attribute="longest", epochs=[2, 1, 1])
    stream.fit(rows, epochs=5, verbose=0, callbacks=[stages, Watch()])
    assert seen == [S, S, 4 * S, None, None] and stages.stage == 2
    rows.longest = S
    until = Curriculum(rows, (S, None), attribute="longest", monitor="loss", threshold=1000.0, stop=True)
    assert len(stream.fit(rows, epochs=5, verbose=0, callbacks=[until]).epoch) == 2 and rows.longest is None

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
    batches.blocks = 2
    grow, found = Curriculum(batches, (2, 3, 5), monitor="loss", threshold=[0.1, 0.5]), []
    for epoch, loss in enumerate((0.4, 0.1, 0.6, 0.4, 0.0)):
        grow.on_epoch_begin(epoch)
        found.append(batches.blocks)
        grow.on_epoch_end(epoch, {"loss": loss})
    assert found == [2, 2, 3, 3, 5]
    both = {"epochs": 1, "monitor": "loss", "threshold": 1}
    short = [{"monitor": "loss", "threshold": [1]}, {"monitor": "loss", "threshold": [1, 1], "stop": True}]
    for wrong in ({}, both, {"monitor": "loss"}, {"epochs": [1]}, {"epochs": 1, "stop": True}, *short):
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
    lm.fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[grow, DatasetPosition(batches), Watch()])
    assert shapes == [(0, 16), (2, 24)] and batches.position == 4


def test_ramp():
    ramp = keras_fam.training.Ramp(0.8, delay=3, ramp=4)
    rates = [float(numpy(ramp(ops.convert_to_tensor(i)))) for i in range(12)]
    np.testing.assert_allclose(rates, [0, 0, 0, 0.16, 0.32, 0.48, 0.64] + [0.8] * 5, rtol=1e-6)
    jump = keras_fam.training.Ramp(1.0, delay=2)
    assert [float(numpy(jump(ops.convert_to_tensor(i)))) for i in range(4)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="`delay`"):
        keras_fam.training.Ramp(0.5, delay=-1)


def test_passing_sets_in_with_the_schedule():
    """In compiled steps: the learned memory gets gradients until every row starts from the one that is passed on."""
    lm = make_lm(random_state_passing=keras_fam.training.Ramp(1.0, delay=2))
    lm.compile(keras.optimizers.SGD(1e-1))
    tokens = np.random.default_rng(0).integers(1, V, (B, 3 * S))
    moved = []
    for _ in range(4):
        before = numpy(lm.backbone.memory_prompt)
        lm.train_on_batch(tokens, np.roll(tokens, -1, axis=1))
        moved.append(bool(np.abs(numpy(lm.backbone.memory_prompt) - before).max() > 0))
    assert moved == [True, True, False, False]
    clone = type(lm).from_config(lm.get_config()).backbone.random_state_passing
    assert clone.rate.get_config() == {"value": 1.0, "delay": 2, "ramp": 0}
