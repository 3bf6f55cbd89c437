"""Rollouts: engines that generate, agents that act, and the collection of groups."""
