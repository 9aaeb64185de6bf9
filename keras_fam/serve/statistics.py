"""What an engine has done, in numbers that only grow, for metrics and tests."""

import threading

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds


class Statistics:
    """Counters of one engine.

    Attributes:
        prompt_tokens, generated_tokens: read since the start.
        turns, failures: ended well; by error code.
        steps, rows_read: steps of the batch, and rows that read in them: their ratio over B is the batch fill.
        loads, saves, store_failures: reads and writes of stored sessions, and calls that failed after all attempts.
        resumed, replayed: turns that went on from a stored middle; that had been done before.
    """

    def __init__(self, rows):
        self.rows, self._lock = rows, threading.Lock()
        self.prompt_tokens = self.generated_tokens = self.turns = self.steps = self.rows_read = 0
        self.loads = self.saves = self.store_failures = self.resumed = self.replayed = 0
        self.failures = {}
        self.first_token_seconds, self.first_token_counts = 0.0, [0] * (len(BUCKETS) + 1)

    def add(self, **counts):
        """Adds to counters by name."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def first_token(self, seconds):
        """A turn has its first token, so many seconds after it came in."""
        with self._lock:
            self.first_token_seconds += seconds
            self.first_token_counts[sum(seconds > bound for bound in BUCKETS)] += 1

    def failed(self, error):
        """A turn ended with a `ServeError`."""
        with self._lock:
            self.failures[error.code] = self.failures.get(error.code, 0) + 1

    def snapshot(self, **now):
        """All of it as a dict of numbers, dicts and lists; `now` is added."""
        found = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**found, "failures": dict(self.failures), "first_token_counts": list(self.first_token_counts), **now}
