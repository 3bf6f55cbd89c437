"""The policy: a vision-language model, how it reads an episode, and how a step changes it."""
