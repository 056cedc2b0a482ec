"""Architectures, one file a family: a module in PyTorch, and beside it the same forward pass in JAX.

The JAX twin is a pure function of the module's weights by name, so that both backends start from the same bits. Modules
are made with PyTorch's own initialisation unless they say otherwise; see :mod:`ntkbench.networks.initialisation`.
"""
