"""The mean over every superpixel (ASP). Called by `preprocess.pipeline`."""

from __future__ import annotations

import numpy as np

from preprocess.kernels import kernel


def superpixel_means(values_YX: np.ndarray, superpixels_YX: np.ndarray, num_superpixels: int) -> np.ndarray:
    """The mean of `values_YX` over each superpixel.

    `values_YX`: integers of up to 32 bits or floats (y, x); `superpixels_YX`: uint8 or uint16 (y, x) in
    0..num_superpixels-1. Returns float64 (num_superpixels,); a superpixel without a pixel gets 0. Sums are exact
    for integers; of floats they are float64, in an order that depends on nothing but the map.
    """
    sums = np.zeros((4, num_superpixels), np.float64 if values_YX.dtype.kind == "f" else np.int64)
    counts = np.zeros((4, num_superpixels), np.int64)
    _add(values_YX.ravel(), superpixels_YX.ravel(), sums, counts)
    return sums.sum(axis=0) / np.maximum(counts.sum(axis=0), 1)


@kernel
def _add(values: np.ndarray, superpixels: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
    """Add values (n,) and their number to the superpixels that they lie in; `sums`, `counts`: (4, superpixels).

    Superpixels are read 64 bits at a time. A word that goes on with the superpixel before it, as four of five do
    at 512 x 512, is summed in registers; any other is split, and neighbours go to different rows of `sums`, so
    that no addition waits for the one before it.
    """
    bits = np.iinfo(superpixels.dtype).bits  # unlike `itemsize` known when compiling: the loops below unroll
    per_word = 64 // bits
    mask = np.uint64(2**bits - 1)
    repeat = np.uint64(2**64 - 1) // mask
    head = min(len(superpixels), -superpixels.ctypes.data % 8 * 8 // bits)
    tail = head + (len(superpixels) - head) // per_word * per_word
    words = superpixels[head:tail].view(np.uint64)
    body = values[head:tail]
    sums_0, sums_1, sums_2, sums_3 = sums
    counts_0, counts_1, counts_2, counts_3 = counts
    run_word, run_sum, run_length = np.uint64(0), sums_0[0], 0
    for w in range(len(words)):
        word = words[w]
        part = body[w * per_word : w * per_word + per_word]
        if word == run_word:
            for i in range(per_word):
                run_sum += part[i]
            run_length += per_word
        else:
            sums_0[run_word & mask] += run_sum
            counts_0[run_word & mask] += run_length
            for i in range(0, per_word, 4):
                a = word >> np.uint64(bits * i) & mask
                b = word >> np.uint64(bits * (i + 1)) & mask
                c = word >> np.uint64(bits * (i + 2)) & mask
                d = word >> np.uint64(bits * (i + 3)) & mask
                sums_0[a] += part[i]
                sums_1[b] += part[i + 1]
                sums_2[c] += part[i + 2]
                sums_3[d] += part[i + 3]
                counts_0[a] += 1
                counts_1[b] += 1
                counts_2[c] += 1
                counts_3[d] += 1
            run_word, run_sum, run_length = (word >> np.uint64(64 - bits)) * repeat, sums.dtype.type(0), 0
    sums_0[run_word & mask] += run_sum
    counts_0[run_word & mask] += run_length
    for i in range(head):
        sums_0[superpixels[i]] += values[i]
        counts_0[superpixels[i]] += 1
    for i in range(tail, len(superpixels)):
        sums_0[superpixels[i]] += values[i]
        counts_0[superpixels[i]] += 1
