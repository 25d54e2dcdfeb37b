"""Command `winnow`, with recipes, profiles, queries, the demo, and reports."""
