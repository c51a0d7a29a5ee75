"""A flow map of captioned emoji, an image-text scorer, and a judge."""
