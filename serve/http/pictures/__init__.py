"""Pictures of requests: where they come from, and where their kept tokens lie."""
