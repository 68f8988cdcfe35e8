"""Random schemas and random models: what ends is in its form, and what is in no form yet is not called complete.

benchmarks/grammar.py does the same with 10,000 pairs.
"""

from tests.grammar.pairs import answered, called


def test_answers_fit_their_schemas(processor):
    results = [answered(processor, seed) for seed in range(300)]
    assert sum(result.ended for result in results) > 250
    assert sum(bool(result.refused) for result in results) < 5
    assert {result.fault for result in results} == {""}


def test_calls_are_read_back_and_fit_their_tools(processor):
    results = [called(processor, seed) for seed in range(200)]
    assert sum(result.ended for result in results) > 170 and sum(result.calls for result in results) > 100
    assert sum(bool(result.refused) for result in results) < 5
    assert {result.fault for result in results} == {""}
