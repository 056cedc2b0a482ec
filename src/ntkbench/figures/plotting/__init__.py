"""Drawing helpers of the figures."""
