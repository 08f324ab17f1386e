"""Rows for training tests, without files."""

import numpy as np


class RandomRows:
    """Rows of random tokens: one to three documents each and, in odd rows, padding."""

    def __init__(self, count, length, vocab=97, seed=0):
        random = np.random.default_rng(seed)
        self.rows = []
        for index in range(count):
            padding = int(random.integers(1, 9)) if index % 2 else 0
            cuts = sorted(random.choice(np.arange(2, length - 9), size=2, replace=False).tolist())
            bounds = [0, *cuts, length - padding]
            lengths = np.diff(bounds)
            self.rows.append((random.integers(0, vocab, length), lengths, padding))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]
