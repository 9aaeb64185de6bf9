"""Session numbers that cannot be guessed, and the secret that lists them.

TensorFlow seeds its own generators from 32 bits of entropy: whoever got one number could search all seeds and predict
the others. Here a number is Philox of 128 bits that are drawn at export and stay in the SavedModel, mixed with a nonce
of the running server (numbers differ after a restart) and with a counter. Whoever can read the SavedModel on the
server's disk can predict numbers; clients cannot.
"""

import secrets

from keras_fam.export.saved_model.serving_functions import tensorflow

LARGEST = 2**63 - 1


def _random_int64():
    return secrets.randbits(64) - 2**63


class NumberGenerator:
    """Draws random session numbers from 0 to 2**63 − 1, in a graph and under the table's lock."""

    def __init__(self):
        tf = tensorflow()
        self.key = [_random_int64(), _random_int64()]
        self.nonce = tf.Variable(tf.constant(0, tf.int64), trainable=False, name="nonce")
        self.drawn = tf.Variable(tf.constant(0, tf.int64), trainable=False, name="drawn")

    def variables(self):
        return [self.nonce, self.drawn]

    def draw(self, count):
        """int64 `[count]`. Two equal ones in a million have a probability of 5e-8."""
        tf = tensorflow()

        def fresh():  # both seeds 0: whatever seeds were set at export, the server draws its own
            bounds = {"minval": tf.constant(1, tf.int64), "maxval": tf.constant(LARGEST, tf.int64)}
            return tf.raw_ops.RandomUniformInt(shape=tf.zeros([0], tf.int32), **bounds, seed=0, seed2=0)

        before = self.drawn.read_value()
        nonce = tf.cond(self.nonce.read_value() == 0, fresh, self.nonce.read_value)
        kept = [self.nonce.assign(nonce, read_value=False), self.drawn.assign(before + 1, read_value=False)]
        seed = [tf.bitwise.bitwise_xor(nonce, self.key[0]), tf.bitwise.bitwise_xor(before, self.key[1])]
        with tf.control_dependencies(kept):
            numbers = tf.random.stateless_uniform(
                tf.reshape(count, [1]), tf.stack(seed), minval=None, maxval=None, dtype=tf.int64, alg="philox"
            )
            return tf.bitwise.bitwise_and(numbers, LARGEST)


class AdminSecret:
    """A secret string, of which the SavedModel holds keyed hashes (SipHash, 126 bits) and not the string."""

    def __init__(self, secret: str):
        self.keys = [[secrets.randbits(62), secrets.randbits(62)] for _ in range(2)]
        self.hashes = [int(self._hash(secret, key)) for key in self.keys]

    def _hash(self, secret, key):
        return tensorflow().strings.to_hash_bucket_strong(secret, LARGEST, key)

    def matches(self, secret):
        """bool scalar for a string scalar."""
        tf = tensorflow()
        same = [self._hash(secret, key) == wanted for key, wanted in zip(self.keys, self.hashes, strict=True)]
        return tf.reduce_all(tf.stack(same))
