"""Image files to pixels: `files` decodes them, `regions` cuts windows and chips, `cache` keeps cut chips on disk."""
