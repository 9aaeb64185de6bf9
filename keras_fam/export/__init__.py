"""Export: a SavedModel for TF Serving, or one step of a stream as an ONNX, LiteRT or torch file.

| you want | use |
| --- | --- |
| streams on TF Serving, with sessions on the server | `export_serving` |
| one step of a stream with explicit state, on ONNX Runtime, LiteRT or torch | `export_step` |
| whole sequences, as any Keras model | `model.export` of Keras |

`export_serving` works from every backend, for every model here, quantized ones included: B and T are open.
`export_step` writes every system (TransformerFAM, BSWA, and those of `keras_fam.baselines`) in every format below:

| format | written from | batch | tokens |
| --- | --- | --- | --- |
| `"onnx"` | JAX, torch | open or fixed | fixed |
| `"torch"` (`.pt2`) | torch | open or fixed | fixed |
| `"litert"` | TensorFlow | fixed | fixed |

Keras' own `model.export`, for `FeedbackAttention`, `TransformerFAMBlock`, `TransformerFAMCausalLM` and models
around them; what `keras.layers.MultiHeadAttention` reaches there is in parentheses where it is more:

| backend | format | batch | time |
| --- | --- | --- | --- |
| TensorFlow | `"tf_saved_model"` | open | open |
| TensorFlow | `"litert"` | fixed (open) | fixed |
| JAX | `"tf_saved_model"` | open | open |
| JAX | `"onnx"` | open | fixed |
| torch | `"torch"` (`.pt2`) | fixed | fixed |
| torch | `"onnx"` | fixed (open) | fixed |

Pass the open and fixed sizes as `input_signature=[keras.InputSpec(shape=(None, 128), dtype="int32")]`. LiteRT's loops
hold tensors of known shapes only, which is why its batch is fixed; Keras writes ONNX with an open batch from torch by
recording one call, in which a loop over blocks becomes as many steps as that call took. `export_step` has an open batch
on torch. Keras exports no SavedModel from torch: `export_serving` does, and `"onnx"` from TensorFlow needs tf2onnx,
which was not tried. `stateful=True` is not for export: variables that hold a state are shared by all clients of a
SavedModel, and other formats do not write to them.
"""

from keras_fam.export.saved_model.export_serving import export_serving as export_serving
from keras_fam.export.step.stream_step import export_step as export_step
