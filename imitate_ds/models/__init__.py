"""Networks: image encoder, aggregation, projections, text encoders, and the model of them all."""
