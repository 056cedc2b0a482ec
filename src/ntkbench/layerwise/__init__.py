"""Structured derivatives for PyTorch: exact kernels by layers, without ever forming a Jacobian.

trace.py        one sample's forward pass as a graph of ATen operations
rules.py        the structure of gradients at the operations that weights take part in
layers.py       where that graph uses its parameters
capture.py      inputs and cotangents of all layers, for all samples, layer by layer
factors.py      gradients of a layer in factored form
contraction.py  from factors to a layer's part of Theta, by the cheaper of two orders of summation
blocks.py       one block of a kernel
kernel.py       the kernel: whole, block by block, or its diagonal
kernels.py      kernels between samples that stand for the NTK
method.py       what the methods by layers share

Importing the room starts no backend; its files but ``method.py`` import torch.

Novak et al. 2022 (arXiv 2206.08720), section 3, do this in JAX on the equations of a jaxpr.
"""
