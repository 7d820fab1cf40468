"""From settings to results: the plan, the runner and the stages of a benchmark."""
