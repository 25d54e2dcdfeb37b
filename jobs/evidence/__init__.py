"""Figures of the field on the user's own configuration: plans of ordinary recipes, their measurement, and a page."""
