"""The suite that asv runs over commits, and that ``ntkbench compare-commits`` takes its cases from.

It only calls public functions of the installed ntkbench, on its own networks, so that it runs on old commits.
"""
