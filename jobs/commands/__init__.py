"""What `winnow` can be told to do, a module a kind."""
