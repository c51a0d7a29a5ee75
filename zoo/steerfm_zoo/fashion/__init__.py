"""A flow map of Fashion-MNIST, and a classifier and a judge of its classes, with statistics of the data in their features."""
