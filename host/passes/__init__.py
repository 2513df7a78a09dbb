"""Compiler passes: each a pure function over the model's tensors or over a finished program."""
