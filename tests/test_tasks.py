"""Language models: scores, text in `fit`, and what Keras has to know about their input."""

import keras
import numpy as np
import pytest
from keras import ops
from small_model import SETTINGS, logits, model, tokens, with_text
from support import close, numpy

import keras_fam
from keras_fam.ops.backend import compiled
from keras_fam.streaming.generation import tokenize

# Scores and text -----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_source():
    keras_hub = pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(0)
    sizes = {name: SETTINGS[name] for name in list(SETTINGS)[:6]}
    source = keras_hub.models.LlamaCausalLM(backbone=keras_hub.models.LlamaBackbone(**sizes), preprocessor=None)
    lm = keras_fam.hub.convert(source, block_size=16, memory_segments=0, fam_length=2, initial_fam="summary")
    x = tokens()
    targets = np.roll(x, -1, 1)

    def both(x, targets):
        wanted = source.score(x, scoring_mode="loss", target_ids=targets)
        return lm.score(x, scoring_mode="loss", target_ids=targets), wanted

    found, wanted = compiled(both, lambda: lm.variables + source.variables)(*map(ops.convert_to_tensor, (x, targets)))
    close(found, wanted, 1e-4)
    with pytest.raises(ValueError, match="'logits' or 'loss'"):
        lm.score(x, scoring_mode="bits")
    with pytest.raises(ValueError, match="`target_ids`"):
        lm.score(x, scoring_mode="loss")


def test_fit_evaluate_and_predict_on_strings():
    lm = with_text()
    lm.compile("sgd")
    texts = ["ab a", "b", "a a ab", "ab"]
    x, y, weights = lm.preprocessor(texts)
    weights = numpy(weights).astype("float32")
    found = lm.evaluate(texts, batch_size=2, verbose=0)
    x = {name: numpy(value) for name, value in x.items()}
    expected = lm.evaluate(x, numpy(y), sample_weight=weights, batch_size=2, verbose=0)
    assert found == pytest.approx(expected, rel=1e-5)
    history = lm.fit(texts, epochs=2, batch_size=2, validation_data=texts[:2], verbose=0).history
    assert history["loss"][1] < history["loss"][0] and len(history["val_loss"]) == 2
    assert lm.predict(np.array(texts), batch_size=2, verbose=0).shape == (4, 8, 31)
    assert tokenize(lm, "ab a", start=True) == [3, 5], "there is no start token to add"
    with pytest.raises(ValueError, match="leave `y` and weights out"):
        lm.fit(texts, np.zeros(4))
    lm.preprocessor = None
    with pytest.raises(ValueError, match="CausalLMPreprocessor of KerasHub"):
        lm.fit(texts)


# What Keras has to know about the input ------------------------------------------------------------------------------


def test_a_built_model_knows_its_input(tmp_path, monkeypatch):
    lm = model(num_layers=1)
    lines = []
    lm.summary(print_fn=lines.append)
    assert "(None, None, 16)" in "\n".join(lines), "the backbone's output shape"
    lm.save_to_preset(tmp_path / "preset")
    loaded = keras_fam.TransformerFAMCausalLM.from_preset(tmp_path / "preset")
    given = []
    monkeypatch.setattr(keras.Model, "export", lambda self, *args, **kwargs: given.append(kwargs["input_signature"]))
    for each in (loaded, loaded.backbone):
        each.export(tmp_path / "x")
    loaded.export(tmp_path / "x", input_signature=["mine"])
    assert [(spec.shape, spec.dtype) for (spec,) in given[:2]] == 2 * [((None, None), "int32")]
    assert given[2] == ["mine"]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras writes SavedModels by TensorFlow")
def test_tensorflow_exports_a_model_and_one_around_it(tmp_path):
    import tensorflow as tf

    lm = model(num_layers=1)
    inputs = keras.Input((None,), dtype="int32")
    for i, each in enumerate((lm, keras.Model(inputs, lm(inputs)))):
        each.export(tmp_path / str(i), verbose=False)
        found = tf.saved_model.load(tmp_path / str(i))
        for x in (tokens(), tokens(9, rows=3)):
            close(found.serve(x), logits(lm, x), 1e-6)
