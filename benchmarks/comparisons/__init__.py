"""Comparisons in one process, side by side: ratios of times that do not depend on when each was measured.

Apart from the suite beside it, whose files all of the study's measurements depend on.
"""
