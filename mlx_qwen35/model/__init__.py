"""How layers are joined: the model, its layers one by one or in windows, and the head that guesses on.

decoder.py   one layer: a mixer of tokens and a feed-forward block
windows.py   several layers at a time, where experts are streamed
model.py     embedding, layers, head, vision
mtp.py       the multi-token-prediction head
pasts.py     what other ranks hold of caches
"""

from mlx_qwen35.model.decoder import DecoderLayer as DecoderLayer
from mlx_qwen35.model.model import Model as Model
