"""The search that goes on while a model trains."""
