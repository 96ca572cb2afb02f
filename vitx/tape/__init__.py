"""The core of vitx: one pass of a model is recorded as a tape of ATen calls, along which two ways go back.

`recorder` runs the pass and writes a `tape` of `values` and steps; `rules` say how relevance and the gradient
go back through each operator, `sums` and `attention` what a residual and an attention are. `walk` is the loop
of both ways, that of the gradient and that of `relevance`; `backward` is what a method asks of them,
`conservation` checks what arrived, and `grid` makes it a map. Nothing here reads what a model declares.
"""
