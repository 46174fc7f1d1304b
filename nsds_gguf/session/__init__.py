"""What one model yields in a run, each part computed once."""
