"""Answers of a given form: JSON, or JSON by a schema, held token by token (llguidance, extra [serve])."""
