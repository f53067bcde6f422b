"""The parts of fine-tuning: data, heads, losses, schedules, what is frozen."""
