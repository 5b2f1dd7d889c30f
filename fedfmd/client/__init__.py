"""A client of a federated run: its app, what its process keeps, its round, its state."""
