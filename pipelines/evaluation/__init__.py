"""Evaluation: benchmarks answered on Ray and scored."""
