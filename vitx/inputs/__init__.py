"""From files, pictures, arrays and clips to what a model takes.

Nothing here knows a model but by what it declares of its images.
"""
