"""What people run: the command, recipes, the demo world, reports."""
