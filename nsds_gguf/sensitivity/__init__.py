"""Sensitivities: the divergence that noise in each tensor causes, in nats."""
