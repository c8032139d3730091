"""What training on chips costs, and which pyramid suits a data set: `plan`.

`cost` counts chips, pixels and boxes, `suggest` searches for a pyramid, `page` and `tables` show the results.
"""
