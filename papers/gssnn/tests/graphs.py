"""Graphs that tests share."""

from __future__ import annotations

from ..symbolic.interpreter import Graph

# push (add (connect identity)): node 0, node 1, and edge 2 between them at port 0.
PAIR = Graph(edges=((0, 1, 2, 0),), nodes=(0, 1))
# A path 0 – 1 – 3 whose second edge is at port 1.
PATH = Graph(edges=((0, 1, 2, 0), (1, 3, 4, 1)), nodes=(0, 1, 3))
# A triangle with a tail.
KITE = Graph(edges=((0, 1, 2, 0), (0, 3, 5, 1), (1, 3, 4, 2), (3, 6, 7, 3)), nodes=(0, 1, 3, 6))
