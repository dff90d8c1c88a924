"""DVP, dynamic visual prompting (arXiv 2306.00409), on BERT, T5 and LLaMA.

A language model reads text; before its layer K, one query of text pools the tokens of a frozen vision encoder into one
prompt, which goes in front of the text, so that the layers from K on read one row more. B samples, T text tokens,
N visual tokens of width Dv, D the language model's width, L labels.

The layers below K and those from K on are run here rather than by the language model's own forward, because their
masks, positions and caches differ in length.
"""

from petl_ext.models.dvp.base import DVPModel
from petl_ext.models.dvp.bert import DVPBert
from petl_ext.models.dvp.llama import DVPLlama
from petl_ext.models.dvp.t5 import DVPT5

__all__ = ["DVPT5", "DVPBert", "DVPLlama", "DVPModel"]
