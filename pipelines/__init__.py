"""Ray wiring around the model library: data, training, evaluation, export, serving.

Imports run one way: ``jobs -> pipelines -> tinygptv``. This package may use ray, mlflow, pyarrow and fastapi; the
library below it may not.
"""
