"""Predicted cost and error of each method on a network: passes, seconds, bytes and relative error.

Operations are counted from shapes, and the speeds of the machine are measured once (``machine``): these tell which
sizes are too slow to be tried. The products of the network are timed in a few sizes (``rates``), and a few probes give
its effective ranks (``pilot``). Methods that need only products run on a small dense Jacobian with these ranks and the
network's sizes (``stand_in``), which records their products, the time of their other work, and the width of their
intervals. All other methods, which trace or compile the network, run on a few of its samples (``samples``).
"""

from ntkbench.cost.costs import Cost, Costs
from ntkbench.cost.predict import of_budgets, predict

__all__ = ["Cost", "Costs", "of_budgets", "predict"]
