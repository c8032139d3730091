"""Runs as something a person can look at.

`pictures` draws chips and detections.
"""
