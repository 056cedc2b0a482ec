"""The suite that asv runs over commits, and that ``ntkbench compare-commits`` takes its cases from.

It calls public functions of the installed ntkbench alone, on networks of its own, so that it runs on commits far back.
"""
