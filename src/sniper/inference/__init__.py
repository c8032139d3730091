"""Find objects in whole images of any size (SNIPER §4), and proposals for negative chips (§3.2).

`search` runs a detector over the levels and windows of images, `detector` merges the results, `mining` keeps an RPN's
proposals.
"""
