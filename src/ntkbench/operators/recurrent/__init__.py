"""Recurrent networks: their Jacobian from explicit derivatives, for blocks of probes, and Theta = P K P*.

A problem whose module has a :class:`~ntkbench.operators.recurrent.cells.Recurrence` gets its Jacobian from here.

cells.py           one step of each kind of cell, and its derivatives
injections.py      S, the map from parameters to injections into the gates
products.py        products with J = P S
base.py            the operator, without its loops over time
torch.py, jax.py   the operator in each backend: its loops over time
torch_trajectory.py, jax_trajectory.py
                   the forward pass in each backend
graphs.py          products replayed as CUDA graphs
state_kernel.py    the factors K and P of the state NTK
"""
