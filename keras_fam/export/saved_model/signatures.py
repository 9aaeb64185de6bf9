"""The signatures of an export: flat, named tensors in and out."""

from keras_fam.export.saved_model.serving_functions import Reader, after, tensorflow
from keras_fam.export.saved_model.token_choice import Options, check_options, generate


def stateless_signatures(reader: Reader):
    """`serving_default`, `padded`, `init_state`, `step` and, for a language model, `generate`: names to functions."""
    tf = tensorflow()

    def serving_default(token_ids):
        lengths = tf.fill(tf.shape(token_ids)[:1], tf.shape(token_ids)[1])
        (token_ids,) = after(reader.check_tokens(token_ids, lengths), token_ids)
        return {reader.output: reader.whole(token_ids)}

    def padded(token_ids, padding_mask):
        token_ids, padding_mask = after(reader.check_padding(token_ids, padding_mask), token_ids, padding_mask)
        return {reader.output: reader.whole(tf.where(padding_mask, token_ids, 0), padding_mask)}

    def init_state(batch_size):
        (batch_size,) = after(reader.check_batch_size(batch_size), batch_size)
        return with_state({}, reader.initial(batch_size))

    def step(token_ids, lengths, **leaves):
        served = from_leaves(leaves)
        checks = [*reader.check_tokens(token_ids, lengths), *reader.check_rows(served, token_ids)]
        token_ids, lengths = after(checks, token_ids, lengths)
        outputs, served = reader.read(token_ids, lengths, served)
        return with_state({reader.output: outputs}, served)

    def generate_tokens(token_ids, lengths, max_new_tokens, temperature, top_k, seed, stop_tokens, **leaves):
        served, options = from_leaves(leaves), Options(max_new_tokens, temperature, top_k, seed, stop_tokens)
        checks = [*reader.check_tokens(token_ids, lengths), *reader.check_rows(served, token_ids)]
        token_ids, lengths = after([*checks, *check_options(options, token_ids)], token_ids, lengths)
        tokens, counts, served = generate(reader, token_ids, lengths, served, options)
        return with_state({"tokens": tokens, "lengths": counts}, served)

    def from_leaves(leaves):
        return reader.pack(leaves[name] for name in reader.names)

    def with_state(outputs, served):
        return {**outputs, **dict(zip(reader.names, reader.flatten(served), strict=True))}

    state = {name: (spec.shape, spec.dtype) for name, spec in zip(reader.names, reader.leaf_specs(), strict=True)}
    found = {
        "serving_default": function(serving_default, token_ids=TOKENS),
        "padded": function(padded, token_ids=TOKENS, padding_mask=((None, None), "bool")),
        "init_state": function(init_state, batch_size=((), "int32")),
        "step": function(step, token_ids=TOKENS, lengths=PER_ROW, **state),
    }
    if reader.generates:
        found["generate"] = function(generate_tokens, token_ids=TOKENS, lengths=PER_ROW, **OPTIONS, **state)
    return found


TOKENS, PER_ROW = ((None, None), "int32"), ((None,), "int32")
OPTIONS = {
    "max_new_tokens": ((), "int32"),
    "temperature": ((), "float32"),
    "top_k": ((), "int32"),
    "seed": ((None,), "int32"),
    "stop_tokens": ((None,), "int32"),
}


def function(body, **inputs):
    """A concrete function of named tensors, each given as `(shape, dtype)`."""
    tf = tensorflow()
    specs = {name: tf.TensorSpec(shape, dtype, name=name) for name, (shape, dtype) in inputs.items()}
    return tf.function(body, autograph=False).get_concrete_function(**specs)
