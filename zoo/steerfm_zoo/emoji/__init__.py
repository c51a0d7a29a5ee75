"""A flow map of captioned emoji, a scorer of pictures and words, and a judge of them."""
