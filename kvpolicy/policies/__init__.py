"""The built-in retention policies, one paper a page."""
