"""What keeps a workflow safe: dedupe, quotas, the plugin sandbox, backoff."""
