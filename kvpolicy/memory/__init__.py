"""Memories: what a policy keeps of evicted tokens, beside the tokens that it retains."""
