"""Architectures, one file per family: a PyTorch module, and beside it the same forward pass in JAX.

The JAX version is a pure function of the module's weights by name, so that both backends start from identical weights.
Modules have PyTorch's own initialisation unless stated otherwise; see :mod:`ntkbench.networks.initialisation`.
"""
