"""What every measuring process does alike."""

from ntkbench import running


def test_memory_that_a_process_held_freed_counts_for_the_call_that_takes_it_again():
    size = 100_000  # far below what a C library maps by itself and gives back at once

    def call():
        return sum(len(part) for part in [bytearray(b"x" * size) for _ in range(640)])

    call()
    peak = running.peak_bytes(call)
    assert peak is None or 640 * size <= peak + 2**21 and peak < 3 * 640 * size
