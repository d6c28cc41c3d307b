"""How many tokens to keep: questions asked at several keep-counts, the search, the report."""
