"""A local web page to look through a data set: `tiles` reads the images, `content` has what is drawn on them.

`chips` chooses the chips that training would cut, `selection` finds the images that a filter keeps, and `server` serves
the page to this machine alone.
"""
