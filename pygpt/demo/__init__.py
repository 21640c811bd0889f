"""`pygpt demo`: the whole job once, on text that every Python installation ships."""
