"""Completion: `generate` of a language model in KerasHub's manner, by way of a stream that starts anew."""

import numpy as np
from keras import ops

from keras_fam.streaming.generation import (
    check_count,
    detokenize,
    find_stop_tokens,
    find_tokenizer,
    pad_rows,
    read_prompt,
)
from keras_fam.streaming.sampling import choose, find_sampler
from keras_fam.streaming.streaming_model import StreamingModel


def generate_from(model, inputs, max_length=None, stop_token_ids="auto", strip_prompt=False):
    """`TransformerFAMCausalLM.generate`: completes prompts, each from a fresh start, as in KerasHub.

    The sampler is the one of `model.compile(sampler=...)`, `"top_k"` by default. A prompt may be longer than any window
    of the model: it is read block by block.

    Args:
        model: a `TransformerFAMCausalLM`.
        inputs: a string or a list of strings (with a preprocessor); a dict of `"token_ids"` and `"padding_mask"`,
            `[B, P]`; int `[B, P]`; a list of token lists; or a `tf.data.Dataset` of such batches.
        max_length: length of the whole, prompt included. Without it: the `sequence_length` of the preprocessor, or P
            of a dict. Token lists need it.
        stop_token_ids: None, ints at which a row ends, or `"auto"`: the tokenizer's end tokens.
        strip_prompt: whether to return the new tokens alone.

    Returns:
        What came in: a string, a list of strings, a dict of `"token_ids"` (int32) and `"padding_mask"` (bool), both
        `[B, max_length]`, or a list of token lists.

    Raises:
        ValueError: for an empty prompt, one longer than `max_length`, or inputs that do not fit.
        ImportError: without KerasHub.
    """
    if hasattr(inputs, "as_numpy_iterator"):
        parts = [generate_from(model, x, max_length, stop_token_ids, strip_prompt) for x in inputs.as_numpy_iterator()]
        if isinstance(parts[0], dict):
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return [row for part in parts for row in ([part] if isinstance(part, str) else part)]
    stops = find_stop_tokens(model, stop_token_ids)
    if isinstance(inputs, bytes | str):
        return generate_from(model, [inputs], max_length, stop_token_ids, strip_prompt)[0]
    if getattr(getattr(inputs, "dtype", None), "kind", None) in ("O", "S", "U"):
        inputs = inputs.tolist()
    first = inputs[0] if isinstance(inputs, list | tuple) and inputs else None
    if isinstance(first, bytes | str):
        find_tokenizer(model)
        if max_length is None and model.preprocessor.sequence_length is None:
            raise ValueError("The preprocessor has no `sequence_length`: say how long the text may be by `max_length`.")
        texts = [text.decode() if isinstance(text, bytes) else text for text in inputs]
        batch = model.preprocessor.generate_preprocess(texts, sequence_length=max_length)
        batch = generate_from(model, batch, max_length, stops, strip_prompt)
        return [detokenize(model, row[mask].tolist()) for row, mask in zip(*batch.values(), strict=True)]
    if isinstance(inputs, dict):
        ids, mask = (np.asarray(ops.convert_to_numpy(inputs[name])) for name in ("token_ids", "padding_mask"))
        prompts = [row[keep] for row, keep in zip(ids, mask.astype("bool"), strict=True)]
        width = ids.shape[1] if max_length is None else max_length
        rows = _complete(model, prompts, width, stops, strip_prompt)
        ids, lengths = pad_rows([*rows, [0] * width])
        return {"token_ids": ids[:-1].astype("int32"), "padding_mask": np.arange(width) < lengths[:-1, None]}
    if max_length is None:
        raise ValueError("Token ids without a padding mask need `max_length`, the length of prompt and new tokens.")
    if isinstance(inputs, list | tuple):
        prompts = list(inputs)
    else:
        prompts = list(ops.convert_to_numpy(inputs))
    return _complete(model, prompts, max_length, stops, strip_prompt)


def _complete(model, prompts, max_length, stops, strip_prompt):
    """Lists of ids, prompts included or not, of at most `max_length` tokens."""
    check_count("max_length", max_length)
    lengths = [np.size(prompt) for prompt in prompts]
    if not prompts or max(lengths) > max_length or not min(lengths):
        raise ValueError(
            f"Prompts have 1 to `max_length` = {max_length} tokens; received {len(prompts)} prompts of lengths "
            f"{lengths}. Read longer texts with a StreamingModel, which has no limit."
        )
    count = max_length - min(lengths)
    new = [[] for _ in prompts]
    if count:
        streams = vars(model).setdefault("_generation_streams", {})  # past Keras' tracking of attributes
        stream = streams.setdefault(len(prompts), None) or StreamingModel(model, len(prompts))
        streams[len(prompts)] = stream
        stream.reset_state()
        found = find_sampler(getattr(model, "sampler", None) or "top_k", None)
        read_prompt(stream, prompts, None)
        tokens, kept = choose(stream, count, found, stops)
        ends = np.minimum(kept, max_length - np.array(lengths))
        new = [row[:n].tolist() for row, n in zip(tokens, ends, strict=True)]
    if strip_prompt:
        return new
    return [[*np.asarray(prompt).tolist(), *row] for prompt, row in zip(prompts, new, strict=True)]
