"""Surface features of prompts (letters, digits, lengths), which a sentence model does not capture."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer

NGRAMS = 1024  # features that character n-grams are hashed to
COUNTED = tuple(
    re.compile(pattern)
    for pattern in (r"[\s\S]", r"\w+", r"\d", r"\d+", r"[^\x00-\x7f]", r"[A-Z]", r"[^\w\s]", r"[=<>+*/^-]", r"\\\w+", r"\?", r"\n")
)
STATISTICS = len(COUNTED)


def ngram_features(prompts: Sequence[str]) -> NDArray[np.float64]:
    """(G, NGRAMS) log counts of hashed character n-grams of length 1 to 4, with the hash's sign. Rows have unit length."""
    hashing = HashingVectorizer(analyzer="char", ngram_range=(1, 4), n_features=NGRAMS, lowercase=False, norm=None)
    counts = hashing.transform(prompts).toarray()
    features: NDArray[np.float64] = np.sign(counts) * np.log1p(np.abs(counts))
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return features


def surface_features(prompts: Sequence[str]) -> NDArray[np.float64]:
    """(G, NGRAMS + STATISTICS) n-gram features and statistics, each scaled to about unit length."""
    return np.hstack((ngram_features(prompts), statistics(prompts) / np.sqrt(STATISTICS)))


def statistics(prompts: Sequence[str]) -> NDArray[np.float64]:
    """(G, STATISTICS) log counts of the matches of `COUNTED`: characters, words, digits, numbers and so on."""
    return np.log1p([[len(pattern.findall(prompt)) for pattern in COUNTED] for prompt in prompts]).reshape(-1, STATISTICS)
