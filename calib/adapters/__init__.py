"""Bundles as models of evaluation harnesses, one module a harness. None is imported before it is used."""
