"""Networks for images of Novak et al. 2022, figures 2 and 4, in both backends.

One file a family: its modules in torch, and beside them the same forward pass in JAX on their weights by name.
"""
