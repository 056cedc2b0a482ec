"""Estimators of NTK metrics from products with the Jacobian."""
