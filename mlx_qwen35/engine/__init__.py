"""One engine: requests that join and leave, each with the answer that it would have had alone. docs/ENGINE.md."""
