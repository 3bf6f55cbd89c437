"""Tools the policy may call while it rolls out. Nothing here imports torch: a sandbox must start fast."""
