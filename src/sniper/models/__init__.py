"""From chips to losses and from images to detections; knows no data set.

`spec` holds the numbers, `backbone` the trunk, `rpn` and `roi_head` the two stages, `targets` what each of them must
learn, `detector` joins them, `weights` keeps them on disk.
"""
