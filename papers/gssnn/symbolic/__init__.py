"""The symbolic half of the paper: a small language of programs that build graphs, and the search for such programs.

types        what a term may be applied to
terms        what programs are made of; reading, writing and measuring them
interpreter  what a program does, and the graph that it leaves
library      which primitives there are, and how probable each is
isomorphism  which graphs are the same
search       programs in order of decreasing probability, sorted by the graphs that they build
compression  new primitives from what programs have in common
"""
