"""Recurrent networks: their Jacobian written out by hand for blocks of probes, and Theta = P K P*.

A problem whose module has a :class:`ntkbench.networks.recurrent.Recurrence` gets its Jacobian from here, one file a
backend: :mod:`cells` has the derivatives of a step, :mod:`injections` the step from parameters to gates, ``torch`` and
``jax`` the loop over time, and :mod:`operators` the factors K and P of the state NTK.
"""
