"""Fixtures of these tests."""

from tests.speakers import encoded  # noqa: F401
