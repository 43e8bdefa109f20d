"""Is this run going to work? Each check takes plain values and returns findings; none leaves anything behind.

Nothing is imported here: what is malicious runs when it is imported, so `versions` comes before all else.
"""
