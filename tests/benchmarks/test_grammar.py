"""The records of benchmarks/grammar.py."""

from benchmarks.grammar import costs, pairs
from mlx_qwen35.library import load_processor
from tests.grammar.pairs import Result, answered


def test_pairs_are_counted():
    record = pairs("schemas", answered, 12)
    assert record["count"] == 12 == record["ended"] + record["refused"] + record["unfinished"]
    assert record["ended"] > 6 and record["faults"] == []
    bad = pairs("schemas", lambda _, seed: Result(ended=True, fault=f"seed {seed}" * (seed == 1)), 3)
    assert bad["faults"] == ["seed 1"] and bad["ended"] == 3


def test_costs_are_those_of_a_whole_answer():
    for record in costs(load_processor("demo"), ("a schema", "a call", "an expression", "GBNF"), 0.5):
        assert record["tokens"] > 50 and record["mask_ms"]["max"] >= record["mask_ms"]["mean"] > 0
