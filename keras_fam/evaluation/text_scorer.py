"""Log-likelihoods and completions of texts of any length, as evaluation harnesses ask for them."""

import numpy as np

from keras_fam.evaluation.ragged_reader import RaggedReader
from keras_fam.state import select_rows
from keras_fam.streaming.streaming_model import StreamingModel
from keras_fam.streaming.text import find_tokenizer
from keras_fam.tasks.prose import encoder


class TextScorer:
    """Answers the three kinds of requests that evaluation harnesses make of a language model.

    Texts are never cut off: each is read from its start as a stream, so memory does not grow with its length. Requests
    are sorted by length and read in rows; a context that several requests share is read once. Token boundaries are
    those of lm-eval's `HFLM`: context and continuation are encoded as one text, what is beyond the tokens of the
    context alone is scored, and white space at the end of a context belongs to the continuation.

    ```python
    scorer = keras_fam.evaluation.TextScorer(lm, batch_size=4)
    scorer.loglikelihood([("The capital of France is", " Paris"), ("The capital of France is", " Rome")])
    scorer.loglikelihood_rolling([open("novel.txt").read()])
    scorer.generate_until(["Question: 2 + 2?\\nAnswer:"], until=["\\n"], max_new_tokens=8)
    ```

    Args:
        model: a `TransformerFAMCausalLM`.
        batch_size: int, rows that are read at once.
        tokenizer: None (that of the model's preprocessor), or what `keras_fam.tasks.encoder` takes; `generate_until`
            also needs its `detokenize` or `decode`.
        prefix_token_id: None, or int, the token before texts without a context. By default the tokenizer's start token,
            else its end token.
        add_start_token: `"auto"` (as the preprocessor does, or False without one), or bool: whether contexts begin with
            the start token.
        stop_token_ids: `"auto"` (the tokenizer's end tokens) or ints at which completions end.
        blocks_per_step: see `RaggedReader`; no result changes.

    Raises:
        ValueError: without a tokenizer, or if neither it nor the arguments say what stands before a text.
    """

    def __init__(
        self,
        model,
        batch_size: int = 8,
        *,
        tokenizer=None,
        prefix_token_id: int | None = None,
        add_start_token: bool | str = "auto",
        stop_token_ids="auto",
        blocks_per_step: int = 8,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer. Received: {batch_size!r}")
        self.model, self.batch_size = model, batch_size
        self.tokenizer = find_tokenizer(model) if tokenizer is None else tokenizer
        self.reader = RaggedReader(model, blocks_per_step)
        self._encode, self._decode = encoder(self.tokenizer), _decoder(self.tokenizer)
        start, *ends = (
            getattr(self.tokenizer, name, None) for name in ("start_token_id", "end_token_id", "end_token2_id")
        )
        ends = [int(i) for i in ends if i is not None]
        if add_start_token == "auto":
            add_start_token = start is not None and getattr(model.preprocessor, "add_start_token", False)
        if add_start_token and start is None:
            raise ValueError("`add_start_token` needs a tokenizer with a start token. Received: one without")
        self._start = [int(start)] if add_start_token else []
        found = next((i for i in (prefix_token_id, start, *ends) if i is not None), None)
        if found is None:
            raise ValueError(
                "Texts without a context follow a start or end token, and the tokenizer names none. Pass "
                "`prefix_token_id`."
            )
        self.prefix_token_id = int(found)
        self.stop_token_ids = ends if isinstance(stop_token_ids, str) else [int(i) for i in stop_token_ids]

    # Texts as token ids -----------------------------------------------------------------------------------------

    def encode(self, text, start=True):
        """A list of ids; with `start`, after the start token, if contexts have one."""
        return [*(self._start if start else ()), *self._encode(text).tolist()]

    def encode_pair(self, context, continuation):
        """`(context_ids, continuation_ids)`, two lists; the first is never empty.

        Raises:
            ValueError: if no token of the continuation is left to score.
        """
        if context == "":
            before, ids = [self.prefix_token_id], self.encode(continuation, start=False)
            if ids[:1] == before:
                before, ids = ids[:1], ids[1:]
        else:
            stripped = context.rstrip()
            whole = self.encode(context + continuation)
            before = self.encode(stripped) or [self.prefix_token_id]
            ids = whole[len(before) :]
            if not stripped and not self._start:  # white space alone: all of it is scored
                ids = whole
        if not ids:
            raise ValueError(
                f"A continuation must add a token to its context. Received: {continuation[:40]!r} after "
                f"{context[-40:]!r}"
            )
        return before, ids

    # Requests ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, pairs):
        """Scores continuations of contexts.

        Args:
            pairs: iterable of `(context, continuation)`, two str each; an empty context stands for the prefix token.

        Returns:
            A list of `(log-likelihood, greedy)`: float, in nats, and bool, whether every token of the continuation is
            the most probable one.
        """
        return self.score_tokens([self.encode_pair(*pair) for pair in pairs])

    def loglikelihood_rolling(self, texts):
        """A list of float: the log-likelihood in nats of each text (str, of any length) after the prefix token.

        A harness cuts texts into windows for models that need it; here, each text is one stream.
        """
        pairs = [([self.prefix_token_id], self.encode(text, start=False)) for text in texts]
        return [total for total, _ in self.score_tokens(pairs)]

    def score_tokens(self, pairs, done=None):
        """As `loglikelihood`, of token ids.

        Args:
            pairs: list of `(context, continuation)`, two int sequences each; the context has at least one token.
            done: None, or a function that is called with the number of a pair and its result as soon as that is known.

        Returns:
            A list of `(log-likelihood, greedy)`.
        """
        prompts, numbers = {}, {}
        for number, (context, _) in enumerate(pairs):
            if not len(context):
                raise ValueError(f"A context must have at least one token. Received: none in pair {number}")
            key = np.asarray(context[:-1], "int32")
            prompts[key.tobytes()] = key
            numbers.setdefault(key.tobytes(), []).append(number)
        results, order = [None] * len(pairs), sorted(prompts, key=lambda key: -len(prompts[key]))
        for keys in _batches(order, self.batch_size):
            state = self.read([prompts[key] for key in keys])
            waiting = [(row, number) for row, key in enumerate(keys) for number in numbers[key]]
            waiting.sort(key=lambda pair: -len(pairs[pair[1]][1]))
            for some in _batches(waiting, self.batch_size):
                rows = [row for row, _ in some] + [0] * (self.batch_size - len(some))
                inputs, targets = [], []
                for _, number in some:
                    context, continuation = pairs[number]
                    inputs.append([context[-1], *continuation[:-1]] if len(continuation) else [])
                    targets.append(continuation)
                spare = [[]] * (self.batch_size - len(some))
                totals, greedy, _ = self.reader.score([*inputs, *spare], [*targets, *spare], select_rows(state, rows))
                for (_, number), total, right in zip(some, totals, greedy, strict=False):
                    results[number] = float(total), bool(right)
                    if done is not None:
                        done(number, results[number])
        return results

    def read(self, prompts):
        """The `StreamState` of `batch_size` rows after up to so many int sequences, each from its start."""
        spare = [[]] * (self.batch_size - len(prompts))
        return self.reader.read([*prompts, *spare], self.model.get_initial_state(self.batch_size))

    def generate_until(self, contexts, until=(), *, max_new_tokens=256, sampler="greedy", seed=None, done=None):
        """Completes contexts until one of some strings, or an end token, or so many tokens.

        Args:
            contexts: list of str; an empty one stands for the prefix token.
            until: a str or an iterable of str, which are not part of the result.
            max_new_tokens: int.
            sampler, seed: see `StreamingModel.generate`; samplers that choose one token at a time.
            done: None, or a function that is called with the number of a context and its completion.

        Returns:
            A list of str, each cut at the first of the strings.

        Raises:
            ValueError: for arguments that do not fit, or a tokenizer that cannot decode.
        """
        until = [until] if isinstance(until, str) else [text for text in until if text]
        ids = [self.encode(context) or [self.prefix_token_id] for context in contexts]
        results = [None] * len(ids)
        for numbers in _batches(sorted(range(len(ids)), key=lambda i: -len(ids[i])), self.batch_size):
            state = self.read([ids[i][:-1] for i in numbers])
            last = [ids[i][-1] for i in numbers] + [self.prefix_token_id] * (self.batch_size - len(numbers))
            completions = self.complete(state, last, len(numbers), until, max_new_tokens, sampler, seed)
            for number, text in zip(numbers, completions, strict=True):
                results[number] = text
                if done is not None:
                    done(number, text)
        return results

    def complete(self, state, last, count, until=(), max_new_tokens=256, sampler="greedy", seed=None):
        """Texts that follow a state.

        Args:
            state: `StreamState` of B rows.
            last: list of B int, the token that each row reads first.
            count: int, how many of the rows are of interest: the first ones.
            until, max_new_tokens, sampler, seed: see `generate_until`.

        Returns:
            A list of `count` str.
        """
        stream = StreamingModel(self.model, len(last))
        stream.set_state(state)
        tokens, texts = [[] for _ in range(count)], [None] * count
        steps = stream.generate_stream(
            [[int(i)] for i in last],
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=seed,
            stop_token_ids=self.stop_token_ids or None,
        )
        for step in steps:
            for row in (row for row in range(count) if texts[row] is None):
                token = int(step[row])
                ended = token < 0 or token in self.stop_token_ids
                if not ended:
                    tokens[row].append(token)
                    ended = any(end in self._decode(tokens[row]) for end in until)
                if ended:
                    texts[row] = self._decode(tokens[row])
            if None not in texts:
                break
        texts = [self._decode(tokens[row]) if text is None else text for row, text in enumerate(texts)]
        return [cut(text, until) for text in texts]


def cut(text, until):
    """A text before the first of the strings `until`."""
    for end in until:
        text = text.split(end)[0]
    return text


def _batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def _decoder(tokenizer):
    """A function from a list of ids to str."""
    call = getattr(tokenizer, "detokenize", None) or getattr(tokenizer, "decode", None)
    special = set(getattr(tokenizer, "special_token_ids", ()))

    def decode(ids):
        if call is None:
            raise ValueError(
                "Completions need a tokenizer with `detokenize` or `decode`. Received: "
                f"{type(tokenizer).__name__}. Pass another `tokenizer`."
            )
        ids = [i for i in ids if i not in special]
        text = call(ids) if ids else ""
        text = text.numpy() if hasattr(text, "numpy") else text
        return text.decode(errors="replace") if isinstance(text, bytes) else str(text)

    return decode
