"""Structured derivatives in PyTorch: exact kernels layer by layer, without a Jacobian.

trace.py           one sample's forward pass as a graph of ATen operations
recording.py       recording it so that its derivative is what autograd computes
replacements.py    operations whose derivatives are wrong or missing under vmap
rules/             the structure of gradients at the operations that use weights
layers.py          where that graph uses its parameters
computed.py        weights that are computed from parameters alone, such as normalised ones
capture.py         inputs and cotangents of all layers, for all samples, layer by layer
factors.py         per-sample gradients of a layer in factored form
contraction.py     from factors to a layer's part of Theta, by the cheaper of two orders of summation
blocks.py          one block of a kernel
kernel.py          the kernel: as a whole, block by block, or its diagonal
parts.py           rectangles of a kernel, one by one
reuse.py           the kernel from the trace of an equal network, if one is cached
certificate.py     the gradient from a kernel's factors, compared with plain autograd
last_product.py    the linear layer that a network ends with
sample_kernels.py  kernels between samples that approximate the NTK
tuning.py          sizes and costs that affect only speed

Importing the package imports no backend; its modules import torch.

Novak et al. 2022 (arXiv 2206.08720), section 3, do this in JAX on the equations of a jaxpr.
"""
