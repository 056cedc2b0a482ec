"""What each method takes on a network, in passes, seconds and bytes, and how far off it is: predicted, not measured.

Nothing is known beforehand of the machine or of the network. Its products are timed in a few sizes (``rates``), and a
few probes give its effective ranks (``pilot``). Methods that need products alone run on a small dense Jacobian with
these ranks and the network's sizes (``stand_in``), which tells which products they ask for, how long all else takes
them, and how wide their intervals are. All other methods, which trace or compile the network, run on a few of its
samples (``samples``).
"""

from ntkbench.cost.costs import Cost, Costs
from ntkbench.cost.predict import predict

__all__ = ["Cost", "Costs", "predict"]
