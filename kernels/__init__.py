"""Triton kernels: every op of `drrlhf.backends.OPS` on a GPU, one op a file.

Each file runs downwards from the kernels through what launches them to the function that
`drrlhf.backends` calls, which takes the arguments of the same function in `drrlhf.reference` and
returns what it returns. The mathematics that several kernels share is in `numerics`, `softmax`,
`pair_losses` and `dual_search`.
"""
