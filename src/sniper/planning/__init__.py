"""What training on chips would cost, and which pyramid suits a data set.

`cost` counts chips and pixels, `suggest` searches for a pyramid, `page` and `tables` show both.
"""
