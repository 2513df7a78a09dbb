"""Balanced trees of two-operand functions."""

import operator

__all__ = ["tree", "tree_sum"]


def tree(values, combine):
    """``combine`` over a list that is not empty, neighbours first, as a balanced tree."""
    values = list(values)
    while len(values) > 1:
        values = [combine(*pair) if len(pair) == 2 else pair[0]
                  for pair in (values[i:i + 2] for i in range(0, len(values), 2))]
    return values[0]


def tree_sum(values):
    """The sum of a list that is not empty."""
    return tree(values, operator.add)
