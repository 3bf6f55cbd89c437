"""Tasks: prompts, tools, the scaffold's words and the rewards of one kind of episode (``tasks.task.Task``)."""
