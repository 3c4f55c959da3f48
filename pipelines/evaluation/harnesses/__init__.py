"""Other people's evaluation harnesses drive the model in process: lmms-eval and VLMEvalKit (docs/evaluation.md).

A harness imports its own module here; nothing else in the project does, and neither package is required.
"""
