"""``dlq`` on the command line: one module a family of commands."""
