"""The numerics of a decoder: layer views, forward and backward through them."""
