"""Answers: engine, decoder, sampling, text streams, assistant, batches, drift."""
