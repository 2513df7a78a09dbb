"""Golden models in PyTorch and numpy: the float reference and the bit-exact functional level."""
