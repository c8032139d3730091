"""Image files to pixels: `files` decodes them, `regions` resizes the part that a window shows, `cache` keeps chips."""
