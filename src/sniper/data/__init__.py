"""From files on disk to batches of chips; imports no model.

`datasets` reads annotations, `images` reads pixels, `epoch` orders the chips of one pass, `batches` and `loader` read
them for training.
"""
