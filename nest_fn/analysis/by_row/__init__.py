"""Keeps the rows of a batch apart: chunks, the loss of each row, the gradient of each row."""
