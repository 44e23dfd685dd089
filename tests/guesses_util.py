"""Tables of n-grams made of a few texts."""

import numpy as np

from medusa_ext.distill.records import Record
from medusa_ext.loading.ngrams import Ngrams, count_ngrams


def ngrams_of(texts: list[list[int]], vocab_size: int, most: int = 10_000) -> Ngrams:
    records = [Record(np.array(ids, np.int32), np.ones(len(ids), np.bool_)) for ids in texts]
    return count_ngrams(records, vocab_size, most)
