"""Operations on tensors: the contrastive loss, in several forms behind one door."""
