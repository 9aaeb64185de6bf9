"""Completion: `generate` of a language model in KerasHub's manner, by way of a stream of its own for every call."""

import keras
import numpy as np
from keras import ops

from keras_fam.streaming.generation import (
    check_count,
    continue_rows,
    find_sampler,
    pad_rows,
    read_prompt,
    start_call,
)
from keras_fam.streaming.streaming_model import StreamingModel
from keras_fam.streaming.text import as_texts, detokenize, find_stop_tokens, find_tokenizer, is_one_text


class GenerationMixin:
    """`generate` of a language model."""

    sampler = "top_k"

    def generate(self, inputs, max_length=None, stop_token_ids="auto", strip_prompt=False):
        """Completes prompts, each from an initial state, as in KerasHub.

        The sampler is the one of `model.compile(sampler=...)`, `"top_k"` by default. A prompt may be longer than any
        window of the model: all of it is read, block by block. Threads may call `generate` of one model at once: every
        call has streams of its own, and answers are those given alone.

        ```python
        lm.compile(sampler="greedy")
        lm.generate("Once upon a time", max_length=200)                            # a string, with a preprocessor
        lm.generate([[5, 3, 8], [2]], max_length=20, stop_token_ids=None)          # lists of ids
        ```

        Args:
            inputs: a string, or a list, array or tensor of strings (with a preprocessor); a dict of `"token_ids"` and
                `"padding_mask"`, `[B, P]`; int `[B, P]`; a list of token lists; or a `tf.data.Dataset` of such batches.
            max_length: length of the whole in tokens, prompt included. Token lists and arrays need it. Without it, a
                dict has its P, and text the `sequence_length` of the preprocessor; a text that is itself as long as
                that, or longer, is continued by up to `sequence_length` tokens.
            stop_token_ids: None, ints at which a row ends, or `"auto"`: the tokenizer's end tokens.
            strip_prompt: whether to return the new tokens alone.

        Returns:
            What came in: a string, a list of strings, a dict of `"token_ids"` (int32) and `"padding_mask"` (bool), both
            `[B, max_length]`, or a list of token lists.

        Raises:
            ValueError: for an empty prompt, one longer than `max_length`, or inputs that do not fit.
            ImportError: for a sampler of KerasHub, without KerasHub.
        """
        if hasattr(inputs, "as_numpy_iterator"):
            parts = [self.generate(x, max_length, stop_token_ids, strip_prompt) for x in inputs.as_numpy_iterator()]
            if isinstance(parts[0], dict):
                return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            return [row for part in parts for row in ([part] if isinstance(part, str) else part)]
        stops = find_stop_tokens(self, stop_token_ids)
        texts = as_texts(inputs)
        if texts is not None:
            prompts = _prompts_of_texts(self, texts)
            rows = _complete(self, prompts, _text_lengths(self, prompts, max_length), stops, strip_prompt)
            texts = [detokenize(self, row) for row in rows]
            return texts[0] if is_one_text(inputs) else texts
        if isinstance(inputs, dict):
            ids, mask = (_to_numpy(inputs[name]) for name in ("token_ids", "padding_mask"))
            prompts = [row[keep] for row, keep in zip(ids, mask.astype("bool"), strict=True)]
            width = ids.shape[1] if max_length is None else max_length
            rows = _complete(self, prompts, [width] * len(prompts), stops, strip_prompt)
            ids, lengths = pad_rows([*rows, [0] * width])
            return {"token_ids": ids[:-1].astype("int32"), "padding_mask": np.arange(width) < lengths[:-1, None]}
        if max_length is None:
            raise ValueError("Token ids without a padding mask need `max_length`, the length of prompt and new tokens.")
        prompts = list(inputs) if isinstance(inputs, list | tuple) else list(_to_numpy(inputs))
        prompts = [_to_numpy(prompt) if hasattr(prompt, "shape") else prompt for prompt in prompts]
        return _complete(self, prompts, [max_length] * len(prompts), stops, strip_prompt)

    def get_compile_config(self):
        """As in Keras, with the sampler: copies and saved models generate as the model does."""
        config = super().get_compile_config()
        if config:
            config["sampler"] = keras.saving.serialize_keras_object(self.sampler)
        return config


def _prompts_of_texts(model, texts):
    """The ids of every text, as the preprocessor prepares them for generation, none of them cut off."""
    find_tokenizer(model)
    width = 1 + max(map(len, texts))
    while True:
        batch = model.preprocessor.generate_preprocess(texts, sequence_length=width)
        ids, mask = (_to_numpy(batch[name]) for name in ("token_ids", "padding_mask"))
        mask = mask.astype("bool")
        if not mask[:, -1].any():  # else a text may go on behind the last column
            return [row[keep] for row, keep in zip(ids, mask, strict=True)]
        width *= 2


def _text_lengths(model, prompts, max_length):
    """How long every row may become."""
    if max_length is not None:
        return [max_length] * len(prompts)
    limit = model.preprocessor.sequence_length
    if limit is None:
        raise ValueError("The preprocessor has no `sequence_length`: say how long the text may be by `max_length`.")
    return [limit if len(prompt) < limit else len(prompt) + limit for prompt in prompts]


def _complete(model, prompts, max_lengths, stops, strip_prompt):
    """Lists of ids, prompts included or not, of at most as many tokens as `max_lengths` says for each."""
    for length in max_lengths[:1]:
        check_count("max_length", length)
    lengths = [int(np.size(prompt)) for prompt in prompts]
    room = [most - length for most, length in zip(max_lengths, lengths, strict=True)]
    if not prompts or min(room) < 0 or not min(lengths):
        raise ValueError(
            f"A prompt must have 1 to `max_length` tokens; received {len(prompts)} prompts of lengths {lengths} and "
            f"`max_length` {max(max_lengths, default=None)}. Pass a larger `max_length`, or generate with a "
            "StreamingModel, which has no limit."
        )
    new = [[] for _ in prompts]
    if max(room):
        stream = StreamingModel(model, len(prompts))
        call = start_call(find_sampler(model.sampler), None, max(room))
        read_prompt(stream, prompts, None)
        tokens, kept = continue_rows(stream, max(room), call, stops)
        new = [row[:n].tolist() for row, n in zip(tokens, np.minimum(kept, room), strict=True)]
    if strip_prompt:
        return new
    return [[*np.asarray(prompt).tolist(), *row] for prompt, row in zip(prompts, new, strict=True)]


def _to_numpy(x):
    return np.asarray(ops.convert_to_numpy(x) if ops.is_tensor(x) else x)
