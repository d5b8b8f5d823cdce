"""scenes: the built-in generated data set. Rendered objects on a ground, and captions that are true of them.

A scene is symbolic first: one to three objects, each with shape, colour, size, material and a place,
on a ground. `render` draws it by casting rays at exact shapes; `describe` words it. All of it is a
function of the seed, and the splits share no symbolic scene. What training images show may have a long
tail, and some of their captions may be wrong, both in known measure; the other splits stay as they are.
"""
