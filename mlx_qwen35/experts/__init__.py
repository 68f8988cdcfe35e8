"""Banks of routed experts: the same sum, whether the weights are all in memory or come from a file."""
