"""Diagnosis of cached candidates and rewards, before any training: what they can support, in tables and in words."""
