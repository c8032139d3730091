"""From files on disk to batches of chips; knows no model.

`coco` checks annotations, `images` reads pixels, `plan` lays out an epoch of chips, `dataset` batches them, `shapes`
draws a made-up world to try it all on.
"""
