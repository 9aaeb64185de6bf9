"""A `PredictionLog` of TensorFlow Serving, serialized by hand.

Warm-up requests are files of this protocol buffer. Its classes come with `tensorflow-serving-api` alone, which brings
gRPC and pins TensorFlow's version; an export should not need them to write five fields. All of them are messages and
strings, each a key (field << 3 | 2), its length and its bytes. A test parses what is written with the official classes.
"""

import struct

from keras_fam.export.saved_model.serving_functions import tensorflow


def prediction_log(model_name, signature, inputs):
    """A serialized `PredictionLog` of one `PredictRequest`.

    Args:
        model_name: a string.
        signature: name of the signature.
        inputs: NumPy arrays by name.
    """
    tf = tensorflow()
    spec = field(1, model_name.encode()) + field(3, signature.encode())  # ModelSpec.name, .signature_name
    request = field(1, spec)  # PredictRequest.model_spec
    for name, value in inputs.items():
        tensor = tf.make_tensor_proto(value).SerializeToString()
        request += field(2, field(1, name.encode()) + field(2, tensor))  # .inputs, a map
    return field(6, field(1, request))  # PredictionLog.predict_log.request


def field(number, content):
    """A field of bytes: key, length, content."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(number):
    """A non-negative integer in groups of 7 bits, lowest first."""
    out = b""
    while number > 127:
        out += struct.pack("B", number & 127 | 128)
        number >>= 7
    return out + struct.pack("B", number)
