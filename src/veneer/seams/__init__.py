"""The only folder that knows transformers: its attention registry, and a model's anatomy off one traced forward."""
