"""From files on disk to batches of chips; imports no model.

`datasets` reads annotations and `images` reads pixels; `epoch` orders the chips of one pass over the training set, and
`reader`, `batches` and `loader` read them in that order.
"""
