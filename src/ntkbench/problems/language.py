"""Decoder-only transformers for language: small trained ones, and untrained ones of GPT-2's shapes.

Outputs are the logits of all tokens ``[N, T, V]``, those of the last token ``[N, V]``, or the hidden states after each
block ``[N, L, T, d]``. The head is tied to the embedding or has weights of its own.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np

from ntkbench.data import tasks, text
from ntkbench.errors import BadInput
from ntkbench.problems.base import Definition, problem, training

if TYPE_CHECKING:
    from ntkbench.networks.language import Size

Head = Literal["untied", "tied"]
Read = Literal["logits", "last", "states"]

POSITIONS, GPT2_POSITIONS = 64, 1024
HEAD_WIDTH = 64
"""Width of an attention head, in all sizes of GPT-2."""
PIECES = 12_000
"""Pieces of text that the small transformer is trained on, each once."""
FLIPFLOPS = 3200
"""Training trials of the flip-flop."""


@problem(any_size=True)
def transformer_tiny(
    N: int = 4,
    T: int = 6,
    V: int = 11,
    d: int = 8,
    head: Head = "untied",
    read: Read = "logits",
) -> Definition:
    """Transformer of 2 blocks and 2 heads on random tokens, trained for 4 steps to predict the next one."""
    import torch

    from ntkbench.networks.language import Size

    size = Size(V, T, d, layers=2, heads=2)
    drawn = torch.randint(V, (16, T + 1), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(V, (N, T), generator=torch.Generator().manual_seed(1)).numpy()
    recipe = training.Adam(drawn[:, :-1], drawn[:, 1:], training.next_token, batch=8, epochs=2)
    return _transformer(size, tokens, recipe, head, read)


@problem(any_size=True, data=(text.TINY_SHAKESPEARE,))
def transformer_small(
    N: int = 1,
    T: int = POSITIONS,
    head: Head = "untied",
    read: Read = "logits",
) -> Definition:
    """Transformer of 2 blocks, d = 128 and 4 heads on T characters of N held-out pieces of tinyshakespeare.

    Trained for one epoch on 12,000 pieces of 64 characters, about 3 minutes on one core. The cross-entropy of the
    held-out text falls from 4.2 to 2.1 nats per character.
    """
    import torch

    from ntkbench.networks.language import Size

    known, held_out, alphabet = text.characters()
    pieces = text.windows(held_out, POSITIONS)[0]
    if len(pieces) < N or T > POSITIONS:
        raise BadInput(f"there are {len(pieces)} held-out pieces of {POSITIONS} characters; got N={N}, T={T}")
    before, after = (torch.from_numpy(array[:PIECES]) for array in text.windows(known, POSITIONS))
    recipe = training.Adam(before, after, training.next_token, batch=8, epochs=1, lr=2e-3)
    size = Size(len(alphabet), POSITIONS, 128, layers=2, heads=4)
    return _transformer(size, pieces[:N, :T].copy(), recipe, head, read)


@problem(any_size=True)
def transformer_flipflop(
    N: int = 4,
    T: int = 16,
    head: Head = "untied",
    read: Read = "logits",
) -> Definition:
    """Transformer of 2 blocks, d = 32 and 4 heads that outputs the bits of a 3-bit flip-flop; it needs no text.

    An input token encodes the pulses of one step, one of 27. The target token encodes the bits that the pulses have set
    so far, also one of 27. Trained by Adam for 400 steps of 32 trials.
    """
    import torch

    from ntkbench.networks.language import Size

    known, seen = tasks.trials("flipflop", FLIPFLOPS, T, seed=1), tasks.trials("flipflop", N, T)
    pulses, bits = (torch.from_numpy(_as_tokens(array)) for array in (known.inputs, known.targets))
    recipe = training.Adam(pulses, bits, training.next_token, batch=32, epochs=4, lr=3e-3)
    return _transformer(Size(27, T, 32, layers=2, heads=4), _as_tokens(seen.inputs), recipe, head, read)


def _as_tokens(bits: np.ndarray) -> np.ndarray:
    """Tokens, numbers below 27, ``[N, T]``, for three channels of -1, 0 or 1, ``[N, T, 3]``."""
    return (bits.astype(np.int64) + 1) @ np.array([9, 3, 1])


@problem(any_size=True)
def gpt2_small(
    N: int = 1,
    T: int = 128,
    V: int = 50_257,
    d: int = 768,
    L: int = 12,
    head: Head = "tied",
    read: Read = "logits",
) -> Definition:
    """GPT-2 small (124 million parameters) at its published initialisation on random tokens; for estimators."""
    return _gpt2(N, T, V, d, L, head, read)


@problem(any_size=True)
def gpt2_410m(
    N: int = 1,
    T: int = 128,
    V: int = 50_257,
    d: int = 1024,
    L: int = 24,
    head: Head = "untied",
    read: Read = "logits",
) -> Definition:
    """Transformer of 24 blocks and 16 heads (406 million parameters, GPT-2's kind) on random tokens; for estimators."""
    return _gpt2(N, T, V, d, L, head, read)


def _gpt2(N: int, T: int, V: int, d: int, L: int, head: Head, read: Read) -> Definition:
    from ntkbench.networks.language import Size

    if T > GPT2_POSITIONS:
        raise BadInput(f"T can be at most {GPT2_POSITIONS}, got {T}")
    size = Size(V, GPT2_POSITIONS, d, L, heads=max(1, d // HEAD_WIDTH))
    # Drawn row by row, so that a smaller set of sequences is the beginning of a larger one.
    tokens = np.random.default_rng(1).integers(V, size=(N, T))
    return _transformer(size, tokens, None, head, read)


def _transformer(
    size: Size,
    tokens: np.ndarray,
    recipe: training.Training | None,
    head: Head,
    read: Read,
) -> Definition:
    from ntkbench.networks import language
    from ntkbench.networks.initialisation import seeded

    whole = seeded(functools.partial(language.Transformer, size, head), 0)
    part = None if read == "logits" else language.part(whole, size, head, read)
    forward = language.jax_forward(size, read)
    return Definition(whole, tokens, recipe, forward, outputs="states" if read == "states" else "logits", part=part)
