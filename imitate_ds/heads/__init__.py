"""Heads: from the levels of an encoder to the answers of a task.

Every head is a module with three methods. forward(levels, size): S features [B, C_s, H_s, W_s] from fine to coarse, and height
and width of the image -> its outputs. loss(outputs, batch): float32 scalars, of which "loss" is trained; a batch that says
nothing about the task gives zero, with a graph. predict(outputs): what it answers, float32.
"""
