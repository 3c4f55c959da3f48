"""The miniature: its world, its backbones, and the demo from drawing to serving."""
