"""The built-in data set `scenes`: rendered objects on a ground, with captions that are true of them.

A scene is symbolic: one to three objects, each with a shape, colour, size, material and place, on a ground. `render`
draws it by casting rays at exact shapes, and `describe` writes its captions. All of it is a function of the seed,
and the splits share no symbolic scene. The training split may have a long tail of object kinds and a known share of
wrong captions; the other splits are not affected.
"""
