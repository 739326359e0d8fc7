"""CXR-BERT without code of its repository: BERT by other names (BioViL: Boecking et al., ECCV 2022).

Its folder names classes that transformers would download and run. They add a projection for BioViL's own contrastive
space, which we do not read; all else is BERT's. Importing this module tells transformers so.
"""

from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer


class CXRBertConfig(BertConfig):
    model_type = "cxr-bert"


class CXRBertModel(BertModel):
    config_class = CXRBertConfig


class CXRBertTokenizer(BertTokenizer):
    """Found by this name, which stands in the folder."""


AutoConfig.register(CXRBertConfig.model_type, CXRBertConfig, exist_ok=True)
AutoModel.register(CXRBertConfig, CXRBertModel, exist_ok=True)
AutoTokenizer.register(CXRBertConfig, CXRBertTokenizer, exist_ok=True)
