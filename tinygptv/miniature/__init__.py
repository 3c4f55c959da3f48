"""The miniature: a drawn world in which every answer is known, in the file formats of the real data sets.

The way of a scene: ``scenes`` decides what is in it, ``draw`` makes the image; ``words`` and its neighbours
(``referring``, ``captions``, ``questions``, ``conversations``, ``instructions``) say true things about it; ``entries``
and ``formats`` give these the shape of the real sets' files, and ``writers`` writes a world. ``documents`` makes text
for pretraining, ``question_files`` the held-out questions, and ``meaning`` reads all such sentences back and checks
them. ``backbones`` and ``pretrain_*`` are the model that learns them.

The world needs numpy and PIL alone; a scene, its image and its sentences are pure functions of (seed, split, index).
"""
