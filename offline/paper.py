"""The numbers of arXiv 2503.01901, to stand beside one's own. Bits there count 48 for a sparse weight and no tables."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PUBLISHED", "PUBLISHED_3B", "published"]

Rows = Sequence[Sequence[Any]]

# Llama 3.2 1B
PUBLISHED: Mapping[int, Rows] = {
    # block, first order, second order, actual ΔF, one block quantized at a time
    1: (
        (0, 7.10e-4, -5.98e-6, 6.88e-3),
        (1, -6.58e-5, -4.54e-6, 4.45e-3),
        (2, -3.21e-4, -3.66e-6, 3.67e-3),
        (3, -5.04e-4, -3.68e-6, 3.82e-3),
        (4, -7.00e-4, -3.75e-6, 3.72e-3),
        (5, -6.29e-4, -3.61e-6, 4.27e-3),
        (6, -2.04e-4, -3.63e-6, 5.06e-3),
        (7, 6.82e-5, -3.60e-6, 5.59e-3),
        (8, 5.75e-5, -3.97e-6, 6.85e-3),
        (9, 2.86e-4, -4.10e-6, 7.78e-3),
        (10, -6.43e-4, -3.66e-6, 6.57e-3),
        (11, 8.29e-4, -2.95e-6, 6.81e-3),
        (12, 6.14e-4, -2.80e-6, 5.83e-3),
        (13, 1.30e-3, -2.65e-6, 6.57e-3),
        (14, -2.52e-4, -2.84e-6, 5.30e-3),
        (15, 3.47e-4, -5.05e-6, 9.79e-3),
        ("all", 8.92e-4, -6.05e-5, 1.00e-1),
    ),
    # λ, first order, second order, actual ΔF of w + λΔ
    2: (
        (1e-1, 8.92e-5, -6.05e-7, 1.00e-3),
        (5e-2, 4.46e-5, -1.51e-7, 2.73e-4),
        (1e-2, 8.92e-6, -6.05e-9, 1.81e-5),
        (5e-3, 4.46e-6, -1.51e-9, 6.68e-6),
        (1e-3, 8.92e-7, -6.05e-11, 9.54e-7),
    ),
    # rule, intervals, predicted ΔF, relative error against 0.1024
    3: (
        ("uniform", 4, 1.042e-1, 1.72e-2),
        ("uniform", 8, 1.032e-1, 8.39e-4),
        ("uniform", 16, 1.028e-1, 3.90e-4),
        ("uniform", 32, 1.026e-1, 1.62e-4),
    ),
    # sublayer, mean PQI of blocks 1, 5, 8, 11
    4: (
        ("q_proj", 4.53e-8, 4.16e-8, 3.83e-8, 2.63e-8),
        ("k_proj", 9.93e-8, 6.66e-8, 6.11e-8, 4.53e-8),
        ("v_proj", 15.9e-8, 10.7e-8, 9.94e-8, 7.88e-8),
        ("o_proj", 9.13e-8, 7.37e-8, 8.83e-8, 4.67e-8),
        ("gate_proj", 4.22e-8, 2.57e-8, 2.46e-8, 2.90e-8),
        ("up_proj", 4.99e-8, 4.14e-8, 4.01e-8, 3.78e-8),
        ("down_proj", 5.31e-8, 4.37e-8, 4.72e-8, 4.61e-8),
    ),
    # share of weights, share of all PQI
    5: ((0.0015, 0.0453), (0.0071, 0.1129), (0.0525, 0.3406)),
    # run, bits, GB, perplexity on WikiText-2, 4-shot MATH of the instruction-tuned model
    6: (
        ("original", 16, 2.30, 9.75, 29.30),
        ("qtip-2", 2.02, 1.40, 18.67, 0.78),
        ("qtip-2-requant", 2.26, 1.47, 16.01, 2.68),
        ("qtip-3", 3.02, 1.72, 11.17, 18.78),
        ("qtip-3-requant", 3.26, 1.80, 10.83, 20.06),
        ("qtip-4", 4.02, 2.05, 10.12, 26.38),
        ("qtip-4-requant", 4.26, 2.13, 10.06, 27.36),
    ),
    7: (
        ("original", 16, 2.30, 9.75, 29.30),
        ("awq-3", 3.25, 0.86, 16.74, None),
        ("awq-3-requant", 3.25, 0.86, 15.36, None),
        ("squeezellm-3", 3.25, 0.86, 13.86, 11.28),
        ("squeezellm-3-requant", 3.25, 0.86, 13.30, 14.18),
        ("awq-4", 4.25, 0.97, 10.84, 22.82),
        ("awq-4-requant", 4.25, 0.97, 10.65, 24.32),
        ("squeezellm-4", 4.25, 0.97, 10.51, None),
        ("squeezellm-4-requant", 4.25, 0.97, 10.43, 24.74),
    ),
    # what, perplexity on the calibration set, on the test set
    8: (
        ("original", 10.20, 9.75),
        ("outliers and significant", 10.95, 10.45),
        ("outliers", 11.02, 10.52),
        ("outliers of SqueezeLLM's own rule", 11.15, 10.62),
        ("significant", 11.15, 10.65),
        ("dense", 11.30, 10.80),
        ("random", 11.28, 10.77),
        ("β = r_s / 4", 10.94, 10.42),
        ("β = r_s / 2", 10.94, 10.42),
        ("β = r_s", 10.95, 10.45),
    ),
    # run, milliseconds of the prompt and of decoding; on which GPU, and of how many tokens, is not said
    9: (
        ("awq-4", 13, 23768),
        ("awq-4-requant", 18, 35204),
        ("squeezellm-4", 86, 47151),
        ("squeezellm-4-requant", 29, 45266),
        ("squeezellm-3", 85, 33657),
        ("squeezellm-3-requant", 86, 32568),
    ),
}


# Llama 3.2 3B
PUBLISHED_3B: Mapping[int, Rows] = {
    7: (
        ("original", 16, 5.98, 7.81, 44.92),
        ("awq-3", 3.25, 1.80, 10.30, 29.64),
        ("awq-3-requant", 3.24, 1.80, 9.98, 35.08),
        ("squeezellm-3", 3.24, 1.80, 9.39, 33.80),
        ("squeezellm-3-requant", 3.24, 1.80, 9.47, 35.34),
        ("awq-4", 4.25, 2.13, 8.22, 42.88),
        ("awq-4-requant", 4.24, 2.13, 8.20, 42.20),
        ("squeezellm-4", 4.24, 2.13, 8.12, 43.06),
        ("squeezellm-4-requant", 4.24, 2.13, 8.14, 42.24),
    ),
    9: (
        ("awq-4", 31, 59631),
        ("awq-4-requant", 31, 59174),
        ("squeezellm-4", 230, 56882),
        ("squeezellm-4-requant", 68, 56372),
        ("squeezellm-3", 229, 56343),
        ("squeezellm-3-requant", 229, 54640),
    ),
}


def published(table: int, source: str) -> Rows | None:
    """The rows of a table, if the source names the model that it is about."""
    name = source.lower().replace("_", "-")
    for model, tables in (("llama-3.2-1b", PUBLISHED), ("llama-3.2-3b", PUBLISHED_3B)):
        if model in name:
            return tables.get(table)
    return None
