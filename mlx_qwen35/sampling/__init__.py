"""From logits to tokens: what is asked, what rows have seen, what is left of the logits, and the draw."""

from mlx_qwen35.sampling.asked import Sampling as Sampling
from mlx_qwen35.sampling.history import History as History
from mlx_qwen35.sampling.sampler import Sampler as Sampler
