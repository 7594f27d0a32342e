"""The only folder that knows transformers: its attention registry, and a model's anatomy read off one traced forward."""
