"""Models as they are: loaded, run, left as they were; their classes and what they put out.

Nothing here knows attention.
"""
