"""What the demo can answer, for tests with real clients."""

from typing import Any

SUM = [{"role": "user", "content": "What is 17 + 25?"}]  # "42", after some reasoning
PARIS = [{"role": "user", "content": "How is the weather in Paris for 3 days?"}]  # with WEATHER, a call
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
