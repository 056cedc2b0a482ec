"""What every measuring process does alike."""

from ntkbench.measure import timing


def test_memory_that_a_process_held_freed_counts_for_the_call_that_takes_it_again():
    size, count = 2**20, 64

    def take():
        return [b"x" * size + bytes([i]) for i in range(count)]

    large = b"x" * 2**24
    del large  # from now on the C library keeps what is smaller
    freed, still_held = take(), b"x" * size * 2
    del freed  # it lies below what is still held
    peak = timing.peak_bytes(take)
    assert len(still_held) == 2 * size
    assert peak is None or 0.9 < peak / (size * count) < 2
