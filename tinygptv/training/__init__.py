"""Training without a cluster: stages, schedule, optimizer, training step, memory plan."""
