"""Heads: from the levels of an encoder to the answers of a task.

Every head is a module with four methods. forward(levels, size): S features [B, C_s, H_s, W_s] from fine to coarse, and height
and width of the image -> its outputs. sums(outputs, batch): float32 tensors that add up over images, so over ranks too.
combine(sums): float32 scalars, of which "loss" is trained; where nothing is said about the task it is zero, with a graph.
predict(outputs): what it answers, float32.
"""
