"""What noise in each tensor costs, in nats of divergence."""
