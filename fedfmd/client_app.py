"""The ClientApp that Flower loads."""

from fedfmd.client.app import app

__all__ = ["app"]
