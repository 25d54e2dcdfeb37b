"""Commands of `winnow`, one module per group; jobs/__main__.py registers them."""
