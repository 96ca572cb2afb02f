"""The core of vitx: one pass of a model is recorded as a tape of ATen calls, which is then walked backward.

`recorder` runs the pass and writes a `tape` of `values` and steps. `rules` take relevance and the gradient
back through each operator; `sums` and `attention` define residuals and attentions. `walk` is the loop behind
all backward walks, of the gradient and of `relevance`, and `backward` is their interface for methods.
`conservation` checks what arrived, and `grid` turns it into a map. Nothing here relies on model metadata.
"""
