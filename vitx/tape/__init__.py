"""The core of vitx: one pass of a model is recorded as a tape of ATen calls, which is then walked backward.

In the order in which to read it:

    values, tape            what a tape holds: values, and the steps that made them
    recorder, call, rules   the pass, call by call, and the rule of each operator, which `registry` lists;
                            `overload` reads its schema
    sums, attention, heads  residuals, the attentions inside them, and which of these are heads of one
    walk, relevance         the loop behind all backward walks, and what relevance does on its way
    backward                the interface for methods: walks begin at a `score`, `conservation` checks what
                            arrived, and `grid` turns it into a map

`axes` and `contraction` tell what dimensions count, `tensors` and `versions` which value a tensor has now,
and `expanded` computes with relevance that is alike along channels. Nothing relies on model metadata.
"""
