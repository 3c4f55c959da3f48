"""From bytes and words to batches: images, prompts, boxes, samples, conversations, collation, mixture, processor."""
