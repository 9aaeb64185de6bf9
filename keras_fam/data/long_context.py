"""What long context is worth to each token of a text, as loss weights."""

import numpy as np


def long_context_weights(short, long, limit: float = 4.0):
    """Loss weights of tokens by how much better a model predicts them with a long window than with a short one.

    Most tokens follow from the last sentence; the weights let training dwell on those that do not. The weight is
    short − long, between 0 and `limit`, divided by the mean, so that a text weighs as much as without weights.

    Args:
        short: float `[N]`, nats of each token (−log p) with a short window.
        long: float `[N]`, the same with a long window.
        limit: float above 0, nats above which a difference counts no more: noise has no limit.

    Returns:
        float32 `[N]`, at least 0, of mean 1.

    Raises:
        ValueError: for different shapes, values that are not finite, or texts to which long context is worth nothing.

    Example:

    ```python
    weights = keras_fam.data.long_context_weights([3.0, 2.0, 5.0], [3.1, 1.0, 2.0])   # 0, 0.75, 2.25
    ```
    """
    short, long = np.asarray(short, "float64"), np.asarray(long, "float64")
    if short.ndim != 1 or short.shape != long.shape or not np.isfinite(short).all() or not np.isfinite(long).all():
        raise ValueError(
            "`short` and `long` must be finite nats of the same tokens, [N] each. Received: shapes "
            f"{short.shape} and {long.shape}"
        )
    if not limit > 0:
        raise ValueError(f"`limit` must be above 0. Received: {limit!r}")
    gain = np.clip(short - long, 0.0, limit)
    if not gain.any():
        raise ValueError("No token is predicted better with the long window, so there is nothing to weigh by.")
    return (gain / gain.mean()).astype("float32")
