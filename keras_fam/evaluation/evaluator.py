"""`evaluate`: scores by distance beside baselines, knock-outs and several seeds.

A memory layer can learn without its memory being used: the loss falls and nobody notices. So a score is reported
beside the same model with its memory ablated, beside TransformerBSWA of the same window, beside the model whose
gradients stop at the memory segments, and over several seeds.
"""

import numpy as np

from keras_fam.evaluation.ablation import ABLATIONS, layers_of, ways
from keras_fam.evaluation.scorer import StreamScorer, pieces


def evaluate(models, texts, *, ablations=ABLATIONS, boundaries=None, bytes_per_token=None, blocks_per_step=8, seed=0):
    """Scores models on long texts by distance, with the evidence that the memory is what helps.

    Args:
        models: a model; or a dict from a name to a model or to a list of models (the same settings, several seeds).
            Beside a model with memory belong TransformerBSWA of the same window and the same model with
            `stop_memory_gradient=True`; what is left out is listed under `"missing"`.
        texts: int `[B, T]`; a list of chunks; or a function without arguments that returns an iterable of chunks, since
            every model reads them from the start. See `StreamScorer.score`.
        ablations: the ways in which the memory of models that have one is ablated, see `ablate_memory`; `"closed"` too,
            see `StreamScorer`. A way that a model does not have (`"frozen"` with `initial_fam="summary"`) is listed
            under `"missing"`.
        boundaries: see `StreamScorer`.
        bytes_per_token: None, or int `[V]`, how many bytes of text each token stands for: adds bits per byte.
        blocks_per_step: see `StreamScorer`.
        seed: of the shuffles.

    Returns:
        A dict that JSON can hold: `"buckets"`, pairs of the first distance and the one behind the last (None: open);
        `"tokens"` scored in each; `"systems"`, from a name (`"FAM"`, `"FAM, memory zeroed"`) to `"accuracy"`,
        `"exact"` (rows all of whose scored tokens are right), `"bits_per_token"` (perplexity is 2 to that) and perhaps
        `"bits_per_byte"`, each with `"mean"`, `"spread"` (standard deviation over seeds) and `"seeds"`, lists over
        buckets; `"missing"`, the evidence that this comparison lacks.

    Raises:
        ValueError: for an unknown knock-out, or texts without a token to score.
    """
    named = models if isinstance(models, dict) else {"model": models}
    named = {name: list(m) if isinstance(m, (list, tuple)) else [m] for name, m in named.items()}
    open_texts = texts if callable(texts) else lambda: texts
    systems, tokens, edges = {}, None, None
    for name, seeds in named.items():
        able = ways(seeds[0])
        for how in [None, *(how for how in ablations if able and (how in able or how not in ABLATIONS))]:
            sums = []
            for model in seeds:
                scorer = StreamScorer(model, how, boundaries=boundaries, blocks_per_step=blocks_per_step, seed=seed)
                sums.append(scorer.score(open_texts()))
            if tokens is None:
                edges, tokens = scorer.boundaries, sums[0][:, :, 0].sum(0)
                if not tokens.any():
                    raise ValueError("There are tokens to score; received texts whose weights are all 0.")
            count = int(np.flatnonzero(tokens)[-1]) + 1
            size = None
            if bytes_per_token is not None:
                size = _bytes(open_texts(), np.asarray(bytes_per_token), edges)[:count]
            title = name if how is None else f"{name}, memory {how}"
            systems[title] = summary([s[:, :count] for s in sums], size)
    ends = [int(e) for e in edges[1 : count + 1]]
    buckets = [[int(a), b] for a, b in zip(edges[:count], [*ends, None][:count], strict=True)]
    missing = _missing(named, ablations)
    return {"buckets": buckets, "tokens": tokens[:count].astype(int).tolist(), "systems": systems, "missing": missing}


def summary(sums, size=None):
    """Scores of one system from the sums `[B, buckets, 5]` of each seed; None where a bucket is empty.

    Args:
        sums: list of arrays from `StreamScorer.score`.
        size: None, or bytes in each bucket.
    """
    table = {"accuracy": [], "exact": [], "bits_per_token": []} | ({} if size is None else {"bits_per_byte": []})
    for one in sums:
        _, _, weight, nats, right = one.sum(0).T
        complete = ((one[..., 0] > 0) & (one[..., 0] == one[..., 1])).sum(0)
        bits = nats / np.log(2)
        table["accuracy"].append(_ratio(right, weight))
        table["exact"].append(_ratio(complete, (one[..., 0] > 0).sum(0)))
        table["bits_per_token"].append(_ratio(bits, weight))
        if size is not None:
            table["bits_per_byte"].append(_ratio(bits, size))
    result = {}
    for name, seeds in table.items():
        columns = list(zip(*seeds, strict=True))
        result[name] = {
            "mean": [None if None in c else float(np.mean(c)) for c in columns],
            "spread": [None if None in c or len(c) < 2 else float(np.std(c, ddof=1)) for c in columns],
            "seeds": seeds,
        }
    return result


def _ratio(above, below):
    return [float(a / b) if b else None for a, b in zip(above, below, strict=True)]


def _bytes(texts, bytes_per_token, edges):
    """Bytes of the scored targets in each bucket."""
    total = np.zeros(len(edges))
    for _, targets, weights, distance in pieces(texts, 4096):
        bucket = np.searchsorted(edges, distance, side="right") - 1
        np.add.at(total, bucket, weights * bytes_per_token[targets])
    return total


def _missing(named, ablations):
    """Baselines, ablations and seeds that the comparison lacks."""

    def window(model):
        layer = layers_of(model)[0]
        return (layer.block_size, layer.memory_segments), layer.fam_length, layer.stop_memory_gradient

    seen = {name: window(seeds[0]) for name, seeds in named.items()}
    missing = []
    for name, (size, fam_length, _) in seen.items():
        if len(named[name]) < 2:
            missing.append(f"{name}: several seeds")
        if not fam_length:
            continue
        if not any(other == size and not rows for other, rows, _ in seen.values()):
            missing.append(f"{name}: TransformerBSWA of the same window (fam_length=0)")
        if size[1] and not any(other == size and stopped for other, _, stopped in seen.values()):
            missing.append(f"{name}: stop-gradient segments (stop_memory_gradient=True)")
        able = [how for how in ablations if how in ways(named[name][0])]
        missing += [f"{name}: memory {how}" for how in ABLATIONS if how not in able]
    return missing
