"""The smallest settings of a model that has every part, for runs on phantoms."""

TINY_MODEL = {
    "image_encoder": "resnet10t",
    "joint_dim": 32,
    "text_hidden": 64,
    "image_hidden": 64,
    "aggregation": {"pool": 4, "heads": 2, "slots": 160},
}
