"""Further lessons: relational attention in blocks, benchmarks, operation counts, the published checkpoints."""
