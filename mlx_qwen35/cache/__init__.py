"""What a model remembers between calls, of one sequence and of several.

kv.py        stretches of keys and values, and the form in which they are kept
layers.py    what each layer remembers
cache.py     all layers of a sequence: how far it is, how it goes back, how it branches
copies.py    what a cache held at a point of its past, as a cache of its own
rows.py      several sequences side by side, one token of each in a call; ragged.py: a piece of each
listed.py    mlx-lm's caches, read as a Cache
"""

from mlx_qwen35.cache.cache import Cache as Cache
from mlx_qwen35.cache.cache import Follower as Follower
from mlx_qwen35.cache.cache import Snapshot as Snapshot
from mlx_qwen35.cache.layers import AnyLayer as AnyLayer
from mlx_qwen35.cache.layers import DeltaState as DeltaState
from mlx_qwen35.cache.layers import Elsewhere as Elsewhere
from mlx_qwen35.cache.layers import KVCache as KVCache
from mlx_qwen35.cache.layers import State as State
from mlx_qwen35.cache.layers import StretchedKVCache as StretchedKVCache
