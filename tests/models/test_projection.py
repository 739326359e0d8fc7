import pytest
import torch
from torch import nn

from imitate_ds.models.projection import ProjectionHead


def test_published_form():
    head = ProjectionHead(12, 16, 8)
    kinds = [type(layer) for layer in head.layers]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert list(head.layers[4].parameters()) == []
    rows = head(torch.randn(32, 12))
    assert rows.shape == (32, 8)
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)


def test_layer_norm_takes_a_single_row():
    head = ProjectionHead(12, 16, 8, norm="layer")
    row = head(torch.randn(1, 12))
    torch.testing.assert_close(row.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in head.modules())
    with pytest.raises(ValueError, match="more than 1 value"):
        ProjectionHead(12, 16, 8)(torch.randn(1, 12))
