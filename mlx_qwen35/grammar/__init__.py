"""Answers in a form: which tokens may come next, by a schema, an expression, a grammar, or the tools' schemas.

Knows token ids and strings, and llguidance, which follows the grammar. Knows nothing of models or of when things are
computed. docs/FORMS.md says what can be asked.
"""

from mlx_qwen35.grammar.compiled import Grammar
from mlx_qwen35.grammar.matcher import Matcher

__all__ = ["Grammar", "Matcher"]
