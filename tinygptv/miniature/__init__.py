"""The miniature: a drawn world in which every answer is known, in the file formats of the real data sets.

The way of a scene: ``scenes`` decides what is in it, ``draw`` makes the image; ``language`` and its neighbours
(``referring``, ``captions``, ``questions``, ``conversations``, ``instructions``) say true things about it; ``entries``
and ``formats`` give these the shape of the real sets' files, and ``writers`` writes a world. ``documents`` makes text
for pretraining, ``benchmarks`` the held-out questions, and ``meaning`` reads all such sentences back and checks them.

Everything here is numpy and PIL; a scene, its image and its sentences are pure functions of (seed, split, index).
"""
