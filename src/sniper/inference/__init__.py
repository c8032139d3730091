"""Detection in whole images of any size (SNIPER §4), and proposals for negative chips (§3.3).

`search` runs a detector over the levels and windows of images, `detector` merges its detections, `mining` does the same
with an RPN, and `store` keeps the boxes of many images on disk.
"""
