"""What a run needs and GRPO does not."""
