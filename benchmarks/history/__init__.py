"""The suite that asv runs over commits, and that ``ntkbench compare-commits`` takes its cases from.

It only calls public functions of the installed ntkbench, on its own networks, so that it runs on old commits.
"""

import os

ALONE = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
"""Environment of a measuring process. It is set before NumPy is loaded, which reads the number of threads once."""

if __name__ == "history":  # as asv and side.py import it; it is benchmarks.history in processes that do not measure
    os.environ |= ALONE
