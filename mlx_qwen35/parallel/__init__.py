"""One model on several machines, or in several processes: docs/DISTRIBUTED.md."""
