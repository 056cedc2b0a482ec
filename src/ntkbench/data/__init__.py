"""Data sets and tasks that networks are trained on."""
