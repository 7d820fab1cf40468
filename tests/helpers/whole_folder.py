"""Words that make the small folder of the fixture ``whole``, and make it again."""

from __future__ import annotations

LIST = "package:planted/prompts/planted.jsonl"
SMALL = ["model.steps=1", "trainer=cpu", f"prompts.files=[{LIST}]", "prompts.limit=2"]
RUN = [*SMALL, "seeds=2", "localize_seeds=2", "name=whole", "method=none,embedding_noise"]
