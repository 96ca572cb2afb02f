"""One small Vision Transformer, written in many ways that all compute the same function.

A `Function` says what is computed, a `Written` network how: it names a spelling for each of its sites. The
first spelling of a kind is the plain one. `expected` returns the maps computed from full matrices.
"""
